"""PTX text as instructions: what is where among them, which registers there are, and what a launch needs."""

import re
from dataclasses import dataclass
from functools import lru_cache

BITS = {"pred": 1} | {f"{kind}{bits}": bits for bits in (8, 16, 32, 64) for kind in "bus"}
BITS |= {"f16": 16, "bf16": 16, "f32": 32, "bf16x2": 32, "f64": 64}

STATEMENT = re.compile(r"(?:@(!?)([%\w]+)\s+)?([a-z]\w*(?:::?\w+|\.\w+)*)\s*(.*)", re.S)
LABEL = re.compile(r"([$\w]+):(?!:)\s*")
OPERAND = re.compile(r"\{[^}]*\}|\[(?:[^\[\]{}]|\{[^}]*\})*\]|[^\s,]+")
NAME = re.compile(r"(?<![\w.])[%$A-Za-z_][\w.$@]*")


@dataclass(frozen=True)
class Instruction:
    """`@guard opcode operands`; `target` is where a branch goes to."""

    opcode: str
    operands: tuple[str, ...]
    guard: str = ""
    negated: bool = False
    target: int = -1

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}"


@dataclass(frozen=True)
class Program:
    """One kernel."""

    code: tuple[Instruction, ...]
    leaders: frozenset[int]  # where a label is
    registers: dict[str, int]  # name -> bits
    params: tuple[str, ...]  # "u64", "f32", ...
    threads: int
    most_registers: int  # 32-bit registers a thread has at the start


@lru_cache(maxsize=32)
def parse(ptx: str) -> Program:
    """The one kernel of a module."""
    head, _, body = ptx.partition(".entry")[2].partition("\n{")
    reader = _Reader()
    for statement in re.sub(r"//[^\n]*|\.loc\b[^\n]*", "", body[: body.index("$L__func_end0")]).split(";"):
        reader.read(statement.strip())
    threads = re.search(r"\.reqntid (\d+)", head)
    most = re.search(r"\.maxnreg (\d+)", head)
    return Program(
        code=tuple(reader.resolved()),
        leaders=frozenset(reader.labels.values()),
        registers=reader.registers,
        params=tuple(re.findall(r"\.param \.(\w+)", head)),
        threads=int(threads[1]) if threads else 32,
        most_registers=int(most[1]) if most else 255,
    )


class _Reader:
    """Statements one after the other. Inline assembly has scopes, whose names are made unique here."""

    def __init__(self) -> None:
        self.code: list[tuple[Instruction, tuple[int, ...]]] = []
        self.labels: dict[str, int] = {}
        self.registers: dict[str, int] = {}
        self.local: dict[str, int] = {}  # "complete@7", a name in a scope
        self.scopes: tuple[int, ...] = ()
        self.opened = 0

    def read(self, statement: str) -> None:
        """Braces that open and close scopes, labels, then a declaration or an instruction."""
        while statement:
            if statement[0] in "{}":
                self._scope(statement[0] == "{")
                statement = statement[1:].lstrip()
            elif label := LABEL.match(statement):
                self.labels[self._declared(label[1])] = len(self.code)
                statement = statement[label.end() :]
            else:
                break
        if statement.startswith(".reg"):
            self._registers(statement)
        elif statement:
            self._instruction(statement)

    def _scope(self, opens: bool) -> None:
        self.opened += opens
        self.scopes = (*self.scopes, self.opened) if opens else self.scopes[:-1]

    def _declared(self, name: str) -> str:
        if not self.scopes:
            return name
        self.local[f"{name}@{self.scopes[-1]}"] = 1
        return f"{name}@{self.scopes[-1]}"

    def _registers(self, statement: str) -> None:
        _, kind, names = statement.split(maxsplit=2)
        for name in names.split(","):
            base, _, count = name.strip().rstrip(">").partition("<")
            for i in range(int(count)) if count else ("",):
                self.registers[self._declared(f"{base}{i}")] = BITS[kind.strip(".")]

    def _instruction(self, statement: str) -> None:
        found = STATEMENT.fullmatch(statement)
        if not found:
            raise NotImplementedError(f"not PTX as it is known here: {statement}")
        operands = tuple(OPERAND.findall(found[4]))
        self.code.append((Instruction(found[3], operands, found[2] or "", found[1] == "!"), self.scopes))

    def resolved(self):
        """All instructions, names in scopes replaced."""
        for instruction, scopes in self.code:

            def unique(name, scopes=scopes):
                return next((f"{name}@{s}" for s in reversed(scopes) if f"{name}@{s}" in self.local), name)

            operands = tuple(NAME.sub(lambda m, unique=unique: unique(m[0]), text) for text in instruction.operands)
            target = self.labels[operands[0]] if instruction.opcode.startswith("bra") else -1
            yield Instruction(instruction.opcode, operands, unique(instruction.guard), instruction.negated, target)
