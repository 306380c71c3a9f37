"""Which source of images a configuration means."""

from smlp import data
from smlp.train.config import BUNDLED, TrainConfig
from smlp.train.image_folder import ImageFolderSource
from smlp.train.loaders import InMemory, Source
from smlp.train.parallel import World


def open_source(config: TrainConfig, world: World) -> Source:
    """Open the data of ``config``.

    Raises:
        ValueError: if there is no such data, or the batch does not divide or exceeds it.
        ImportError: if a package is missing, with the command that installs it.
    """
    if config.batch_size % world.size:
        raise ValueError(
            f"batch_size: expected a multiple of the {world.size} processes, "
            f"got {config.batch_size}"
        )
    source: Source
    if config.data in BUNDLED:
        source = InMemory(getattr(data, config.data)(), config, world)
    else:
        source = ImageFolderSource(config, world)
    if config.batch_size > source.train_count:
        raise ValueError(
            f"batch_size: expected at most the {source.train_count} training images, "
            f"got {config.batch_size}"
        )
    return source
