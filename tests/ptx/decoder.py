"""PTX text to a program: what stands around the instructions of one entry function."""

import functools
import re

from tests.ptx.builder import PREDICATE, WIDTHS, Builder, Program, PtxError
from tests.ptx.encoder import encode

OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
PARAM = re.compile(r"\.param\s+\.(\w+)\b.*?(\w+),?$")
SHARED = re.compile(r"\.extern\s+\.shared\b.*?(\w+)\[\]")
THREADS = re.compile(r"\.(?:reqntid|maxntid)\s+(\d+)")
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%\w+)<(\d+)>")
LOCAL_REGISTER = re.compile(r"\.reg\s+\.(\w+)\s+(\w+);$")  # between braces


@functools.lru_cache(64)
def decode(text: str) -> Program:
    """The one entry function of a PTX module.

    Raises:
        PtxError: for anything that the executor does not know; nothing is skipped.
    """
    return _Decoder(text).decode()


class _Decoder:
    def __init__(self, text: str) -> None:
        self.lines = text.splitlines()
        self.builder = Builder()
        self.entry: str | None = None
        self.threads = 0
        self.labels: dict[str, int] = {}
        self.branches: list[tuple[int, str]] = []  # instruction, label
        self.sources: dict[int, str] = {}
        self.source = ""  # of the lines that follow
        self.scopes: list[dict[str, str]] = []  # of registers declared between braces

    def decode(self) -> Program:
        in_body = False
        pending = ""
        for number, raw in enumerate(self.lines, 1):
            self.builder.line = number
            code, _, comment = raw.partition("//")
            line = code.strip()
            if line.startswith(".loc"):
                self.source = comment.strip()
            elif not in_body:
                self.header(line)
                in_body = self.entry is not None and line == "{"
            elif line == "}" and not self.scopes:
                break
            elif not self.declaration(line):
                pending += " " + line
                *statements, pending = pending.split(";")
                for statement in statements:
                    self.sources[number] = self.source
                    self.statement(statement.strip())
        if self.entry is None or not in_body:
            raise PtxError("no entry function")
        for index, label in self.branches:
            self.builder.code[index].imm = self.labels[label]
        return self.builder.finish(self.entry, self.lines, self.threads, self.sources)

    def header(self, line: str) -> None:
        """A line before the body."""
        if match := re.search(r"\.entry\s+(\w+)", line):
            self.entry = match[1]
        elif match := PARAM.match(line):
            self.builder.add_param(match[2], WIDTHS[match[1]])
        elif match := SHARED.match(line):
            self.builder.shared_symbols.add(match[1])
        elif match := THREADS.match(line):
            self.threads = int(match[1])

    def declaration(self, line: str) -> bool:
        """A line of the body that holds no statement."""
        if line == "{":
            self.scopes.append({})
        elif line == "}":
            self.scopes.pop()
        elif self.scopes and (match := LOCAL_REGISTER.match(line)):
            name = f"%local{self.builder.line}_{match[2]}"
            self.scopes[-1][match[2]] = name
            self.builder.declare(name, register_width(match[1]))
        elif match := REGISTERS.match(line):
            for i in range(int(match[3])):
                self.builder.declare(f"{match[2]}{i}", register_width(match[1]))
        elif match := re.match(r"(\$?\w+):$", line):
            self.labels[match[1]] = len(self.builder.code)
        else:
            return not line or line.startswith(".")
        return True

    def statement(self, text: str) -> None:
        self.builder.guard = None
        if match := re.match(r"@(!?%?\w+)\s+", text):
            self.builder.guard = self.in_scope(match[1])
            text = text[match.end() :]
        name, rest = re.match(r"(\S+)\s*(.*)", text, re.S).groups()
        operands = OPERAND.findall(self.in_scope(rest))
        if name.partition(".")[0] == "bra":
            self.branches.append((len(self.builder.code), operands[0]))
        encode(self.builder, name, operands)

    def in_scope(self, text: str) -> str:
        """Names of local registers replaced by those that they were declared by."""
        for scope in self.scopes:
            for name, register in scope.items():
                text = re.sub(rf"(?<![\w%.$]){name}(?![\w.])", register, text)
        return text


def register_width(type_: str) -> int:
    return PREDICATE if type_ == "pred" else WIDTHS[type_]
