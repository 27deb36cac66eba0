# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""A cell's function, traced once into straight-line code, with its derivatives by reverse mode.

The function is called on `Value`s, which write down what is done to them on a `Tape`: one line for each operation, and
the same operation on the same operands only once. Going back over the tape writes the lines of the derivatives. What
comes of it is a `Program` of three pieces of `Code`, of which every backend makes its own: Python here, for tensors;
`recurrence_cpu.py` and `recurrence_triton.py` put it into kernels.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple


class CellError(ValueError):
    """A cell does what cannot be compiled; the message names the cell and the operation."""


class Line(NamedTuple):
    """`name = operation(arguments)`; an argument is a name or a number."""

    name: str
    operation: str
    arguments: tuple[str | float, ...]


class Code(NamedTuple):
    """Straight-line code: its lines, and the names or numbers that are its results."""

    lines: tuple[Line, ...]
    results: tuple[str | float, ...]


class Spelling(NamedTuple):
    """How a language writes an operation, by its name, and a number."""

    operations: dict[str, str]
    number: str = "{!r}"

    def argument(self, argument: str | float) -> str:
        """A name as it is, or a number."""
        return argument if isinstance(argument, str) else self.number.format(argument)

    def line(self, line: Line) -> str:
        """One assignment."""
        return f"{line.name} = {self.operations[line.operation].format(*map(self.argument, line.arguments))}"

    def lines(self, code: Code) -> list[str]:
        """An assignment for every line."""
        return list(map(self.line, code.lines))


ARITHMETIC = {"add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "div": "{} / {}", "neg": "-{}"}
FUNCTIONS = ("sigmoid", "tanh", "exp", "sin", "cos")
_ON_TENSORS = Spelling(ARITHMETIC | {name: f"{{}}.{name}()" for name in FUNCTIONS})
_ON_NUMBERS = {
    "sigmoid": lambda x: 0.5 + 0.5 * math.tanh(x / 2),
    "tanh": math.tanh,
    "exp": math.exp,
    "sin": math.sin,
    "cos": math.cos,
}
# What tensors have as methods, functions of torch and operators, by the names that torch gives it.
_SYNONYMS = {"subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div", "negative": "neg"}
_SYNONYMS |= {"rsub": "sub", "special_expit": "sigmoid", "expit": "sigmoid"}


class Value:
    """A number that a traced function calculates with, by what tensors take: operators, methods, torch's functions."""

    def __init__(self, tape: Tape, name: str):
        self._tape, self._name = tape, name

    def __getattr__(self, name: str):
        operation = _SYNONYMS.get(name, name)
        if name.startswith("__") or operation not in (*ARITHMETIC, *FUNCTIONS):
            self._tape.refuse(f"`{name}`")
        return functools.partial(self._tape.add, operation, self)

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        values = [argument for argument in arguments if isinstance(argument, Value)]
        operation = _SYNONYMS.get(function.__name__, function.__name__)
        if options or not values or operation not in (*ARITHMETIC, *FUNCTIONS):
            # A tensor among the arguments, whose operators are called before ours, is refused by the tape.
            tape = (values or [a for part in arguments if isinstance(part, (tuple, list)) for a in part])[0]._tape
            tape.refuse(f"`torch.{function.__name__}`" + (f" with {', '.join(options)}" if options else ""))
        return values[0]._tape.add(operation, *arguments)

    def __add__(self, other):
        return self._tape.add("add", self, other)

    def __radd__(self, other):
        return self._tape.add("add", other, self)

    def __sub__(self, other):
        return self._tape.add("sub", self, other)

    def __rsub__(self, other):
        return self._tape.add("sub", other, self)

    def __mul__(self, other):
        return self._tape.add("mul", self, other)

    def __rmul__(self, other):
        return self._tape.add("mul", other, self)

    def __truediv__(self, other):
        return self._tape.add("div", self, other)

    def __rtruediv__(self, other):
        return self._tape.add("div", other, self)

    def __neg__(self):
        return self._tape.add("neg", self)

    def __pow__(self, exponent):
        if exponent != 2:
            self._tape.refuse(f"the power {exponent!r}")
        return self * self

    def __bool__(self):
        self._tape.refuse("a decision by a number (`if`, `and`, `min`, comparisons)")

    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = lambda self, other: bool(self)
    __hash__ = None


class Tape:
    """The lines of one traced function."""

    def __init__(self, cell: str):
        self.cell = cell
        self.lines: list[Line] = []
        self._names: dict[tuple, str] = {}
        self._lines_of: dict[str, Line] = {}

    def refuse(self, what: str):
        """Raises what says that the cell uses this."""
        known = "+, -, *, /, **2 and " + ", ".join(FUNCTIONS)
        raise CellError(f"Cell {self.cell!r} uses {what}, which cannot be compiled: there are {known}.")

    def add(self, operation: str, *arguments: Value | float) -> Value | float:
        """What the operation gives, at once where it can be told; otherwise by a new line or one that is there."""
        wanted = 1 if operation == "neg" or operation in FUNCTIONS else 2
        if len(arguments) != wanted:
            self.refuse(f"`{operation}` of {len(arguments)} operands")
        operands = tuple(map(self._operand, arguments))
        known = self._known(operation, operands)
        if known is not None:
            return self._value(known)
        if operation == "add" and (line := self._lines_of.get(operands[1])) and line.operation == "neg":
            operation, operands = "sub", (operands[0], line.arguments[0])
        elif operation == "sub" and (line := self._lines_of.get(operands[1])) and line.operation == "neg":
            operation, operands = "add", (operands[0], line.arguments[0])
        # Operands that may change places are put in an order, so that a * b is also b * a.
        key = (operation, *(sorted(operands, key=str) if operation in ("add", "mul") else operands))
        if key not in self._names:
            line = Line(f"v{len(self.lines)}", operation, operands)
            self.lines.append(line)
            self._names[key] = line.name
            self._lines_of[line.name] = line
        return self._value(self._names[key])

    def _operand(self, argument: Value | float) -> str | float:
        if isinstance(argument, Value):
            if argument._tape is not self:
                self.refuse("a value of another call")
            return argument._name
        if isinstance(argument, (int, float)):
            return float(argument)
        self.refuse(f"a {type(argument).__name__} that is none of its arguments")

    def _value(self, operand: str | float) -> Value | float:
        return Value(self, operand) if isinstance(operand, str) else operand

    def _known(self, operation: str, operands: tuple[str | float, ...]) -> str | float | None:
        """The result where no line is needed for it."""
        first, second = (*operands, None)[:2]
        if not any(isinstance(operand, str) for operand in operands):
            numbers = {"add": lambda: first + second, "sub": lambda: first - second, "mul": lambda: first * second}
            numbers |= {"div": lambda: first / second, "neg": lambda: -first}
            return numbers[operation]() if operation in numbers else _ON_NUMBERS[operation](first)
        if operation in ("add", "mul"):
            neutral = 0.0 if operation == "add" else 1.0
            if neutral in operands:
                return second if first == neutral else first
            return 0.0 if operation == "mul" and 0.0 in operands else None
        if operation == "sub":
            if second == 0.0:
                return first
            return self._operand(self.add("neg", self._value(second))) if first == 0.0 else None
        if operation == "div":
            return first if second == 1.0 else 0.0 if first == 0.0 else None
        if operation == "neg" and (line := self._lines_of.get(first)) and line.operation == "neg":
            return line.arguments[0]
        return None

    def gradients(self, outputs: Iterable[tuple[Value | float, Value | float]], wanted: Iterable[Value]) -> list:
        """The sums over (output, seed) of seed * d output / d w, for every w that is wanted."""
        sums: dict[str, Value | float] = {}

        def pass_on(operand: str | float, gradient: Value | float) -> None:
            if isinstance(operand, str):
                sums[operand] = sums.get(operand, 0.0) + gradient

        for output, seed in outputs:
            pass_on(self._operand(output), seed)
        for line in reversed(list(self.lines)):
            if line.name in sums:
                arguments = map(self._value, line.arguments)
                gradients = _RULES[line.operation](sums[line.name], Value(self, line.name), *arguments)
                for operand, gradient in zip(line.arguments, gradients, strict=True):
                    if isinstance(operand, str):
                        pass_on(operand, gradient())
        return [sums.get(value._name, 0.0) for value in wanted]

    def code(self, results: Iterable[Value | float]) -> Code:
        """The lines that the results need."""
        operands = tuple(map(self._operand, results))
        needed, lines = set(operands), []
        for line in reversed(self.lines):
            if line.name in needed:
                needed.update(line.arguments)
                lines.append(line)
        return Code(tuple(reversed(lines)), operands)


# What each operand of an operation is passed on, from the gradient g of its result y: asked for one by one, so that
# numbers cost no line.
_RULES: dict[str, Callable] = {
    "add": lambda g, y, a, b: (lambda: g, lambda: g),
    "sub": lambda g, y, a, b: (lambda: g, lambda: 0.0 - g),
    "mul": lambda g, y, a, b: (lambda: g * b, lambda: g * a),
    "div": lambda g, y, a, b: (lambda: g / b, lambda: 0.0 - g / b * y),
    "neg": lambda g, y, a: (lambda: 0.0 - g,),
    "sigmoid": lambda g, y, a: (lambda: g * (y * (1.0 - y)),),
    "tanh": lambda g, y, a: (lambda: g * (1.0 - y * y),),
    "exp": lambda g, y, a: (lambda: g * y,),
    "sin": lambda g, y, a: (lambda: g * a.cos(),),
    "cos": lambda g, y, a: (lambda: 0.0 - g * a.sin(),),
}


class Program(NamedTuple):
    """A cell of n states, compiled. Its operands are named `state0`, ..., `input0`, ..., `weight0`, ..., `time_step`,
    and those of the adjoint `adjoint0`, ... too.

    `advance` has the n next states as its results; `linearise` those and the n x n Jacobian, row by row, where the row
    is the next state; `adjoint` the sums over the next states of adjoint times derivative by states, inputs, weights
    and, where there is one, the time step. `on_tensors` are the same three as Python functions of these operands in
    this order.
    """

    key: str
    states: int
    inputs: int
    weights: int
    has_time_step: bool
    advance: Code
    linearise: Code
    adjoint: Code
    on_tensors: dict[str, Callable]


# By key. An operator of torch's takes strings, and finds its program here.
PROGRAMS: dict[str, Program] = {}


def operands(program: Program, *, adjoint: bool = False) -> list[str]:
    """The names of a program's operands, in order."""
    names = [f"state{i}" for i in range(program.states)]
    names += [f"input{i}" for i in range(program.inputs)]
    names += [f"weight{i}" for i in range(program.weights)]
    names += ["time_step"] * program.has_time_step
    return names + [f"adjoint{i}" for i in range(program.states)] * adjoint


def compile_program(cell: str, step: Callable, states: int, inputs: int, weights: int, has_time_step: bool) -> Program:
    """Traces `step(states, inputs, weights, time_step)` -> next states, lists of `Value`s, and keeps the program.

    Raises:
        CellError: it does what cannot be compiled.
    """
    tape = Tape(cell)
    blank = Program("", states, inputs, weights, has_time_step, *[Code((), ())] * 3, {})
    named = {name: Value(tape, name) for name in operands(blank, adjoint=True)}
    values = list(named.values())
    before, currents, parameters = values[:states], values[states:][:inputs], values[states + inputs :][:weights]
    following = step(before, currents, parameters, named.get("time_step", 1.0))
    jacobian = [slope for state in following for slope in tape.gradients([(state, 1.0)], before)]
    seeds = [named[f"adjoint{i}"] for i in range(states)]
    wanted = [named[name] for name in operands(blank)]
    gradients = tape.gradients(zip(following, seeds), wanted)
    codes = [tape.code(following), tape.code([*following, *jacobian]), tape.code(gradients)]
    digest = hashlib.sha256(repr((states, inputs, weights, has_time_step, codes)).encode()).hexdigest()[:16]
    key = f"{re.sub(r'[^a-zA-Z0-9_]', '_', cell)}_{digest}"
    if key not in PROGRAMS:
        functions = {
            name: _python(f"{name}_{key}", code, operands(blank, adjoint=name == "adjoint"))
            for name, code in zip(("advance", "linearise", "adjoint"), codes)
        }
        PROGRAMS[key] = Program(key, states, inputs, weights, has_time_step, *codes, functions)
    return PROGRAMS[key]


def _python(name: str, code: Code, names: list[str]) -> Callable:
    body = [*_ON_TENSORS.lines(code), f"return {', '.join(map(_ON_TENSORS.argument, code.results))},"]
    text = fill("def $name($names):\n    $body\n", name=name, names=names, body=body)
    namespace: dict = {}
    exec(compile(text, f"<{name}>", "exec"), namespace)
    return namespace[name]


def fill(template: str, **parts: str | list[str]) -> str:
    """The template with every `$name` replaced: a list, alone on its line, by as many lines as it has, indented as it
    is; within a line, by its items with commas between."""

    def inline(match: re.Match) -> str:
        part = parts[match[1]]
        return part if isinstance(part, str) else ", ".join(part)

    lines = []
    for line in template.splitlines():
        alone = re.fullmatch(r"( *)\$(\w+)", line)
        if alone and not isinstance(parts[alone[2]], str):
            lines += [alone[1] + part if part else "" for part in parts[alone[2]]]
        else:
            lines.append(re.sub(r"\$(\w+)", inline, line))
    return "\n".join(lines) + "\n"
