"""The command ``smlp``: train, use what was trained, and look into a network."""

import argparse
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smlp.ablations import ABLATIONS
from smlp.export import example, export_onnx, largest_difference
from smlp.features import receptive_fields
from smlp.images import image_files, load_image
from smlp.info import as_table, parts
from smlp.network import PyramidNetwork
from smlp.pictures import draw_feature_maps, draw_receptive_fields
from smlp.train import cli as train_cli
from smlp.train.ablations import CHOSEN, DEFAULTS, run_ablations
from smlp.train.config import BUNDLED, MODELS, TrainConfig
from smlp.train.evaluate import evaluate, held_out
from smlp.train.image_folder import batches
from smlp.train.loaders import held_out_shares
from smlp.train.models import Trained, build_model, load_network
from smlp.train.parallel import world_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODEL = "smlpnet_tiny"  # of which a network is, by default
NOISE_IMAGES = 4  # over which an untrained network's receptive field is averaged

Subparsers = Any  # argparse keeps the type of its subparsers to itself


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit code."""
    parser = argparse.ArgumentParser(prog="smlp", description="Sparse-MLP vision networks.")
    parser.add_argument("--version", action="version", version=_versions())
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    train_cli.add_parser(subparsers)
    uses = (_add_evaluate, _add_predict, _add_export)
    for add in (_add_ablations, *uses, _add_info, _add_fields, _add_features):
        add(subparsers)
    arguments = parser.parse_args(argv)
    code: int = arguments.run(arguments)
    return code


def _versions() -> str:
    try:
        ours = version("smlp-kernels")
    except PackageNotFoundError:  # a source tree that is not installed
        ours = "(not installed)"
    return f"smlp {ours}, torch {torch.__version__}"


def _command(
    subparsers: Subparsers, name: str, help_text: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    """Add a command whose errors of usage end in one line and exit code 2."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}."
    )
    parser.set_defaults(run=train_cli.guarded(f"smlp {name}", run))
    return parser


def _add_ablations(subparsers: Subparsers) -> None:
    parser = _command(
        subparsers, "ablations", "train every ablation of the paper and compare them", _ablations
    )
    train_cli.add_arguments(parser, CHOSEN, **DEFAULTS)
    parser.add_argument(
        "--seeds",
        type=train_cli.integers,
        default=(0,),
        help="seeds, such as 0,1,2; every ablation is trained once with each (default 0)",
    )


def _ablations(arguments: argparse.Namespace) -> None:
    options = {key: value for key, value in vars(arguments).items() if key not in ("run", "seeds")}
    train_cli.show_log()
    table = run_ablations(TrainConfig(**(DEFAULTS | options)), arguments.seeds)
    if train_cli.is_main():
        print(table)


def _add_evaluate(subparsers: Subparsers) -> None:
    parser = _command(
        subparsers,
        "evaluate",
        "print accuracy and loss of a trained network on held-out images",
        _evaluate,
    )
    _add_checkpoint(parser)
    parser.add_argument(
        "--data",
        help="digits, mnist5k, a folder of class folders, or a folder with those in val/; "
        "by default the data that the network was trained on",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images at once (default 64)")
    parser.add_argument(
        "--workers", type=int, default=4, help="processes that read images (default 4)"
    )
    _add_device(parser)


def _evaluate(arguments: argparse.Namespace) -> None:
    batch_size = train_cli.at_least(1, arguments, "batch_size")
    workers = train_cli.at_least(0, arguments, "workers")
    trained = load_network(arguments.checkpoint)
    data = trained.data if arguments.data is None else arguments.data
    images = held_out(trained, data)
    with world_of(arguments.device) as world:
        shares = [share for share in held_out_shares(len(images), batch_size, world) if share]
        loaded = batches(images, shares, 0 if data in BUNDLED else workers, world.device)
        loss, accuracy = evaluate(trained.network.to(world.device), loaded, world)
    if world.is_main:
        about = f"on {len(images):,} held-out images of {data}"
        print(f"accuracy {accuracy:.2%}, loss {loss:.4f} {about}")


def _add_predict(subparsers: Subparsers) -> None:
    parser = _command(subparsers, "predict", "print the likeliest classes of image files", _predict)
    _add_checkpoint(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a file, or a folder of them")
    parser.add_argument("--top", type=int, default=3, help="classes to name (default 3)")
    _add_device(parser)


def _predict(arguments: argparse.Namespace) -> None:
    top = train_cli.at_least(1, arguments, "top")
    trained = load_network(arguments.checkpoint)
    paths: list[Path] = []
    for given in map(Path, arguments.images):
        paths += image_files(given) if given.is_dir() else [given]
    if not paths:
        raise ValueError(f"images: expected image files in {', '.join(arguments.images)}, got none")
    with world_of(arguments.device) as world:
        trained.network.to(world.device)
        for path in paths:
            image = trained.preprocessing(path).to(world.device)
            print(f"{path}: {_likeliest(trained, image, top)}")


@torch.no_grad()
def _likeliest(trained: Trained, image: torch.Tensor, top: int) -> str:
    """Name the ``top`` likeliest classes of a normalised image ``[C, H, W]``, and how likely."""
    logits = trained.network(image.unsqueeze(0))[0]
    shares, classes = logits.softmax(dim=0).topk(min(top, len(trained.classes)))
    pairs = zip(classes.tolist(), shares.tolist(), strict=True)
    return ", ".join(f"{trained.classes[label]} {share:.1%}" for label, share in pairs)


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="model.pt of a run of smlp train")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, or auto for a GPU where there is one (default auto)",
    )


def _add_network_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", help="model.pt of a run of smlp train; else the options below"
    )
    parser.add_argument("--model", choices=MODELS, help=f"which network (default {MODEL})")
    size = train_cli.height_and_width
    parser.add_argument(
        "--image-size", type=size, metavar="N,N", help="height,width of the images, or one number"
    )
    integers = train_cli.integers
    parser.add_argument("--depth", type=integers, metavar="N,N", help="layers of each stage")
    parser.add_argument("--ablation", choices=tuple(ABLATIONS), help="one change to an smlpnet")
    counts = {
        "--patch-size": "side of a patch in pixels",
        "--in-channels": "channels of the images",
        "--num-classes": "outputs of the network",
        "--d-model": "channels of the first stage",
    }
    for name, text in counts.items():
        parser.add_argument(name, type=int, help=text)


def _network(arguments: argparse.Namespace) -> tuple[PyramidNetwork, Trained | None]:
    """The network of ``--checkpoint`` and how it was trained, or an untrained one of the options.

    Raises:
        ValueError: if both are given, or sizes do not divide.
    """
    names = (
        "model",
        "image_size",
        "depth",
        "patch_size",
        "in_channels",
        "num_classes",
        "d_model",
        "ablation",
    )
    options = {name: getattr(arguments, name) for name in names}
    given = {name: value for name, value in options.items() if value is not None}
    if arguments.checkpoint is None:
        torch.manual_seed(0)
        return build_model(given.pop("model", MODEL), given), None
    if given:
        raise ValueError(
            f"checkpoint: expected without a network's options, got {', '.join(given)}"
        )
    trained = load_network(arguments.checkpoint)
    return trained.network, trained


def _add_info(subparsers: Subparsers) -> None:
    parser = _command(
        subparsers, "info", "print parameters, multiply-adds and memory of every stage", _info
    )
    _add_network_options(parser)
    parser.add_argument(
        "--batch-size", type=int, default=1, help="images that memory is counted for (default 1)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of parameters and activations (default float32)",
    )


def _info(arguments: argparse.Namespace) -> None:
    network, _ = _network(arguments)
    batch_size, dtype = arguments.batch_size, getattr(torch, arguments.dtype)
    print(as_table(parts(network, batch_size, dtype), batch_size))


def _add_fields(subparsers: Subparsers) -> None:
    parser = _command(
        subparsers, "fields", "draw the receptive field after some of the layers", _fields
    )
    _add_network_options(parser)
    parser.add_argument(
        "--depths",
        type=train_cli.integers,
        metavar="N,N",
        help="numbers of layers (default 1,2,3,4, or as many as there are)",
    )
    parser.add_argument("--image", help="measure on this image instead of noise")
    parser.add_argument("--out", default="fields.png", help="the picture (default fields.png)")


def _fields(arguments: argparse.Namespace) -> None:
    network, trained = _network(arguments)
    size, channels = network.image_size, network.in_channels
    if arguments.image is None:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(NOISE_IMAGES, channels, *size, generator=generator)
    else:
        image = arguments.image
        inputs = trained.preprocessing(image) if trained else load_image(image, channels, size)
        inputs = inputs.unsqueeze(0)
    depths = arguments.depths or range(1, min(4, sum(network.depth)) + 1)
    fields = receptive_fields(network, inputs, list(depths))
    names = {f"{depth} layer{'s' if depth > 1 else ''}": fields[depth] for depth in fields}
    title = (
        f"Receptive field of the central pixel, {'' if trained else 'un'}trained "
        f"{type(network).__name__} of {sum(network.depth)} layers"
    )
    _write(draw_receptive_fields(names, title), arguments.out)


def _add_features(subparsers: Subparsers) -> None:
    parser = _command(
        subparsers, "features", "draw a trained network's feature maps of an image", _features
    )
    _add_checkpoint(parser)
    parser.add_argument("--image", required=True, help="an image file")
    parser.add_argument("--channels", type=int, default=6, help="maps per stage (default 6)")
    parser.add_argument("--out", default="features.png", help="the picture (default features.png)")


def _features(arguments: argparse.Namespace) -> None:
    trained = load_network(arguments.checkpoint)
    network = trained.network
    image = trained.preprocessing.load(arguments.image)
    with torch.no_grad():
        maps = network.forward_features(trained.preprocessing.normalise(image.unsqueeze(0)))
        probabilities = network.mlp_head(maps[-1]).softmax(dim=1)[0]
    rows = {
        f"stage {i + 1}\n{' x '.join(map(str, stage.shape[1:]))}": stage[0]
        for i, stage in enumerate(maps)
    }
    best = int(probabilities.argmax())
    named = f"class {trained.classes[best]}, {probabilities[best]:.0%}"
    title = f"Feature maps of {type(network).__name__}: {named}"
    _write(draw_feature_maps(image, rows, channels=arguments.channels, title=title), arguments.out)


def _add_export(subparsers: Subparsers) -> None:
    parser = _command(
        subparsers, "export", "write an ONNX file and compare it with the network", _export
    )
    _add_network_options(parser)
    parser.add_argument("--out", default="model.onnx", help="the file (default model.onnx)")


def _export(arguments: argparse.Namespace) -> None:
    network, trained = _network(arguments)
    out = _with_folder(arguments.out)
    export_onnx(network, example(network), out)
    difference = largest_difference(out, network, example(network, batch=3))
    print(f"wrote {out}: ONNX Runtime differs by at most {difference:.1e} of the largest output")
    if trained is not None:
        print(f"it takes images from 0 to 1, minus {trained.mean}, divided by {trained.std}")


def _write(figure: "Figure", out: str) -> None:
    path = _with_folder(out)
    figure.savefig(path, format=path.suffix[1:] or "png")  # else it adds a suffix
    print(f"wrote {out}")


def _with_folder(out: str) -> Path:
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
