"""Run compiled PTX on the CPU, all threads of a program in step: what an interpreter of Triton's language cannot show,
such as which lane of a warp holds what. As many instructions as the kernels without tensor cores need (PTX ISA 8.x).

Registers are 64 bits of a thread each, [threads] in uint64; every type is a view of them.
"""

import itertools
import re

import numpy as np
import torch

from minillava.kernels import aot, frame

SIZES = {"8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}
TYPES = {f"{kind}{n}": np.dtype(f"{to}{int(n) // 8}") for n in SIZES for kind, to in ("uu", "bu", "si")}
TYPES |= {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16)}
COMPARE = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal}
COMPARE |= {"ne": np.not_equal}
PLAIN = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and, "or": np.bitwise_or}
PLAIN |= {"xor": np.bitwise_xor, "min": np.minimum, "max": np.maximum, "shl": np.left_shift, "shr": np.right_shift}


def launch(arch):
    """A stand-in for frame.launch: compiles for that card what is to be launched, and runs it on tensors of the CPU."""

    def run_compiled(kernel, grid, *args, config=None, **constants):
        meta = [arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in args]
        constants |= {"SHUFFLE": True} if "SHUFFLE" in constants else {}
        with aot.compiling(arch):
            frame.on_compiled = lambda kernel, compiled, options, constants: compiled
            compiled = frame.launch(kernel, grid, *meta, config=config, **constants)
        # None and 1 are part of the compiled code
        run(compiled.asm["ptx"], grid, [a for a in args if isinstance(a, torch.Tensor) or a not in (None, 1)])

    return run_compiled


def run(ptx, grid, args):
    """Run a kernel over `grid`; `args` are its arguments as it has them, tensors (which it may change) and integers."""
    memory = np.zeros(256 + sum(-(-t.nbytes // 256) * 256 for t in args if isinstance(t, torch.Tensor)), np.uint8)
    params, end, tensors = [], 256, []
    for arg in args:
        params.append(end if isinstance(arg, torch.Tensor) else arg)
        if isinstance(arg, torch.Tensor):
            raw = arg.reshape(-1).view(torch.uint8).numpy()
            memory[end : end + len(raw)] = raw
            tensors.append((arg, end))
            end += -(-len(raw) // 256) * 256
    threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])
    code, labels = _parse(ptx)
    with np.errstate(over="ignore"):
        for place in itertools.product(*map(range, (*grid, 1, 1)[:3])):
            _Program(code, labels, memory, params, threads, place).run()
    for tensor, start in tensors:
        raw = torch.from_numpy(memory[start : start + tensor.nbytes].copy())
        tensor.copy_(raw.view(tensor.dtype).view(tensor.shape))


def _parse(ptx):
    """Instructions (guard, operation, operands), and where labels are among them."""
    body = ptx[ptx.index("{", ptx.index(".reqntid")) + 1 : ptx.index("$L__func_end0")]
    text = re.sub(r"//[^\n]*|\.loc[^\n]*", "", body)
    code, labels = [], {}
    for statement in re.split(r";|(?<=:)\s", text):
        statement = statement.strip().lstrip("}").strip()
        if statement.endswith(":"):
            labels[statement[:-1]] = len(code)
        elif found := re.fullmatch(r"(?:@(!?%p\d+)\s+)?([a-z][\w.]*)\s*(.*)", statement, re.S):
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+", found[3])
            code.append((found[1], found[2].split("."), operands))
    return code, labels


class _Program:
    def __init__(self, code, labels, memory, params, threads, place):
        self.code, self.labels, self.params, self.threads = code, labels, params, threads
        self.memory = {"global": memory, "shared": np.zeros(1 << 17, np.uint8)}
        tid = np.arange(threads, dtype=np.uint64)
        self.registers = {"%tid.x": tid, "%laneid": tid % 32, "global_smem": tid * 0}
        self.registers |= {f"%ctaid.{axis}": tid * 0 + np.uint64(n) for axis, n in zip("xyz", place)}

    def run(self):
        at = 0
        while True:
            guard, operation, operands = self.code[at]
            on = np.ones(self.threads, bool)
            if guard:
                on = self.registers[guard.lstrip("!")].astype(bool) != guard.startswith("!")
            at += 1
            if operation[0] == "ret":
                return
            if operation[0] == "bra":
                assert on.all() or not on.any(), "threads part ways"
                at = self.labels[operands[0]] if on.all() else at
            elif operation[0] != "bar":
                self.step(operation, operands, on)

    def get(self, name, kind):
        """An operand as numbers of a type."""
        if name in self.registers:
            bits = self.registers[name]
        elif name.startswith("0f"):
            bits = np.full(self.threads, int(name[2:], 16), np.uint64)
        elif name.startswith("%"):
            bits = np.zeros(self.threads, np.uint64)  # not written yet: what LLVM leaves undefined counts for nothing
        else:
            bits = np.full(self.threads, int(name, 0) & (2**64 - 1), np.uint64)
        if kind == "bf16":
            return (bits.astype(np.uint16).astype(np.uint32) << 16).view(np.float32)
        type_ = TYPES[kind]
        return bits.astype(SIZES[str(8 * type_.itemsize)]).view(type_)

    def put(self, name, numbers, kind, on=None):
        if kind == "bf16":
            numbers = torch.from_numpy(np.ascontiguousarray(numbers)).bfloat16().view(torch.uint16).numpy()
        elif kind != "pred":
            numbers = np.ascontiguousarray(numbers.astype(TYPES[kind], copy=False))
            numbers = numbers.view(SIZES[str(8 * numbers.itemsize)])
        bits = numbers.astype(np.uint64)
        old = self.registers.get(name, np.zeros(self.threads, np.uint64))
        self.registers[name] = bits if on is None else np.where(on, bits, old)

    def step(self, operation, operands, on):
        name, kind = operation[0], operation[-1]
        out, *inputs = operands
        if name in ("ld", "st"):
            self.move(operation, *operands, on)
        elif name == "add" and operation[-2] == "f32":  # fp32 and 16 bits
            self.put(out, self.get(inputs[0], kind) + self.get(inputs[1], "f32"), "f32")
        elif kind == "f32x2":
            for half in (0, 32):
                for i, operand in enumerate(inputs):
                    self.put(f"in {i}", self.get(operand, "u64") >> half, "u32")
                self.step([*operation[:-1], "f32"], [f"out {half}", *(f"in {i}" for i in range(len(inputs)))], on)
            self.put(out, self.get("out 0", "u64") | self.get("out 32", "u64") << 32, "u64")
        elif name == "mov" and "{" in out + inputs[0]:
            self.pack(out, inputs[0], kind)
        elif name == "mov":
            self.put(out, self.get(inputs[0], kind), kind, on)
        elif name == "setp":
            self.put(out, COMPARE[operation[1]](self.get(inputs[0], kind), self.get(inputs[1], kind)), "pred")
        elif kind == "pred":
            a, *b = (self.registers[i].astype(bool) for i in inputs)
            self.put(out, ~a if name == "not" else {"and": np.logical_and, "or": np.logical_or}[name](a, *b), "pred")
        elif name == "shfl":
            self.shuffle(operation[2], out, *inputs)
        elif name == "cvt":
            self.convert(operation[-2], kind, out, inputs)
        elif name == "bfe":
            a, first, width = (self.get(i, kind) for i in inputs)
            left = 32 - first - width
            self.put(out, (a << left) >> (left + first), kind)
        elif name in ("mul", "mad") and operation[1] == "wide":
            wide = kind[0] + str(2 * int(kind[1:]))
            a, b = (self.get(i, kind).astype(TYPES[wide]) for i in inputs[:2])
            self.put(out, a * b + (self.get(inputs[2], wide) if name == "mad" else 0), wide)
        elif name in ("fma", "mad"):
            exact = np.float64 if kind == "f32" else TYPES[kind]
            a, b, c = (self.get(i, kind).astype(exact) for i in inputs)
            self.put(out, a * b + c, kind)
        elif name in ("neg", "not"):
            a = self.get(inputs[0], kind)
            self.put(out, -a if name == "neg" else ~a, kind)
        elif name not in PLAIN:
            raise NotImplementedError(".".join(operation))
        else:
            second = self.get(inputs[1], "u32" if name in ("shl", "shr") else kind).astype(TYPES[kind])
            self.put(out, PLAIN[name](self.get(inputs[0], kind), second), kind, on)

    def convert(self, to, of, out, inputs):
        if to in ("bf16x2", "f16x2"):  # the first is the upper half
            for i, name in enumerate(inputs):
                self.put(f"half {i}", self.get(name, of), to[:-2])
            self.put(out, self.get("half 0", "u32") << 16 | self.get("half 1", "u32"), "u32")
        else:
            self.put(out, self.get(inputs[0], of), "f32" if to == "f32" else to)

    def pack(self, to, of, kind):
        """Two halves, the lower first, into one register or back."""
        half, bits = f"u{int(kind[1:]) // 2}", int(kind[1:]) // 2
        if "{" in of:
            low, high = (self.get(name, half).astype(TYPES[kind]) for name in re.findall(r"[^\s,{}]+", of))
            self.put(to, low | high << bits, kind)
        else:
            for i, name in enumerate(re.findall(r"[^\s,{}]+", to)):
                self.put(name, self.get(of, kind) >> (i * bits), half)

    def shuffle(self, mode, out, of, index, c, _):
        lane, index, c = (self.get(i, "u32") for i in ("%laneid", index, c))
        segment, warp = c >> 8 & 31, np.arange(self.threads) // 32 * 32
        last = (lane & segment) | (c & 31 & ~segment)
        source = (lane & segment) | (index & 31 & ~segment) if mode == "idx" else lane ^ index
        self.put(out, self.get(of, "u32")[warp + np.where(source <= last, source, lane)], "u32")

    def move(self, operation, first, second, on):
        count = next((int(part[1]) for part in operation if part in ("v2", "v4")), 1)
        kind, (space,) = operation[-1], [s for s in operation if s in ("param", "global", "shared")]
        address, data = (second, first) if operation[0] == "ld" else (first, second)
        names, size = re.findall(r"[^\s,{}]+", data), TYPES[kind].itemsize
        if space == "param":
            number = int(re.search(r"_param_(\d+)", address)[1])
            value = self.params[number] if number < len(self.params) else 0
            self.put(names[0], np.full(self.threads, value, np.int64), kind)
            return
        base, _, more = address.strip("[] ").partition("+")
        at = self.get(base.strip(), "u64" if space == "global" else "u32").astype(np.int64) + int(more or 0)
        memory = self.memory[space]
        assert not (at[on] % (size * count)).any(), "misaligned"
        assert space == "shared" or not on.any() or at[on].min() >= 256, "outside of memory"
        for i, name in enumerate(names):
            where = (at + i * size)[:, None] + np.arange(size)
            if operation[0] == "ld":
                loaded = memory[np.where(on[:, None], where, 0)]
                self.put(name, np.ascontiguousarray(loaded).view(TYPES[kind])[:, 0], kind, on)
            else:
                raw = np.ascontiguousarray(self.get(name, kind)).view(np.uint8).reshape(self.threads, size)
                memory[where[on]] = raw[on]
        assert len(names) == count
