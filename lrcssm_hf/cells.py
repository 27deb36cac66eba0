# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The equations of every recurrence that comes with the package, and how to write another.

A cell is a function of one neuron's state(s) before a step, the step's inputs and the neuron's parameters, which
returns the rate of change of each state:

    x_t = x_{t-1} + dt_t * rate(x_{t-1}, inputs_t, *, parameters)

Everything else (solvers, kernels, derivatives) is made from it. Inputs are (B, T, D), parameters (D,), and all
operations are elementwise, so that neurons do not see each other within a layer and a sequence is solved in parallel.
"""

from __future__ import annotations

import inspect
import itertools
import numbers
from collections.abc import Callable, Sequence

from .cell_compiler import CellError, compile_program


class Cell:
    """A recurrence whose neurons have `states` numbers each, from its rate of change.

    Args:
        function: takes the states, then the inputs, then, keywords only, the parameters, and returns the rate of the
            state, or a tuple of the rates of all states. An input with a number as its default may be left out in a
            scan. Operations are +, -, *, /, **2, sigmoid, tanh, exp, sin and cos, as methods or as torch's functions.
            A function that takes a keyword `time_step` (dt_t, 1 where a scan has none) returns the next states
            instead of rates, which for a time step of 0 have to be the states.
        states: how many states a neuron has.

    Called, it is the function, on tensors or numbers.

    Raises:
        CellError (a ValueError): the function does what cannot be compiled; the message names cell and operation.
    """

    def __init__(self, function: Callable, states: int = 1):
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        self.__doc__ = function.__doc__
        signature = inspect.signature(function).parameters.values()
        kinds = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        for argument in signature:
            if argument.kind in kinds:
                self._refuse(f"takes {kinds[argument.kind]}{argument.name}; every input and parameter needs a name")
        if not isinstance(states, int) or isinstance(states, bool) or states < 1:
            self._refuse(f"has `states` {states!r}; it must be a positive whole number")
        keywords = [a for a in signature if a.kind is inspect.Parameter.KEYWORD_ONLY]
        ordered = [a for a in signature if a.kind is not inspect.Parameter.KEYWORD_ONLY]
        if len(ordered) < states:
            self._refuse(f"takes {len(ordered)} arguments before its parameters; it has {states} states")
        if len(ordered) == states:
            self._refuse("takes no input")
        self.states = tuple(a.name for a in ordered[:states])
        self.inputs = tuple(a.name for a in ordered[states:])
        self.parameters = tuple(a.name for a in keywords if a.name != "time_step")
        self.takes_time_step = len(self.parameters) < len(keywords)
        self.defaults = {a.name: a.default for a in ordered[states:] if a.default is not a.empty}
        for argument in (*ordered[:states], *keywords):
            if argument.default is not argument.empty:
                self._refuse(f"has a default for {argument.name!r}; only an input can be left out")
        for name, default in self.defaults.items():
            if not isinstance(default, numbers.Real):
                self._refuse(f"has {default!r} as the default of {name!r}; it must be a number")
        # Compiled at once, because torch.compile cannot look into the compiler later.
        self._keys = {
            (given, has_time_step): self._compile(given, has_time_step)
            for given in self._choices()
            for has_time_step in (False, True)
        }

    def __call__(self, *arguments, **parameters):
        return self.function(*arguments, **parameters)

    def __repr__(self) -> str:
        return f"Cell({self.name}({', '.join((*self.states, *self.inputs))}, *, {', '.join(self.parameters)}))"

    def key(self, given: Sequence[str], has_time_step: bool) -> str:
        """The name of the compiled program, for scans with these inputs, in the function's order."""
        return self._keys[tuple(given), has_time_step]

    def advance(self, states: Sequence, inputs: dict, parameters: dict, time_step=None) -> list:
        """The next states by the equation: the definition that every solver and kernel is held to.

        States, inputs, parameters and time step are tensors that can be broadcast together, or numbers. A time step of
        None is 1.
        """
        named = {**self.defaults, **{name: value for name, value in inputs.items() if value is not None}}
        arguments = [*states, *(named[name] for name in self.inputs)]
        if self.takes_time_step:
            return self._results(self(*arguments, time_step=1.0 if time_step is None else time_step, **parameters))
        rates = self._results(self(*arguments, **parameters))
        if time_step is None:
            return [state + rate for state, rate in zip(states, rates)]
        return [state + time_step * rate for state, rate in zip(states, rates)]

    def _results(self, returned) -> list:
        results = list(returned) if isinstance(returned, (tuple, list)) else [returned]
        if len(results) != len(self.states):
            self._refuse(f"returns {len(results)} values for its {len(self.states)} states")
        return results

    def _choices(self) -> list[tuple[str, ...]]:
        """The inputs that a scan may have."""
        keeps = [(True, False) if name in self.defaults else (True,) for name in self.inputs]
        return [tuple(itertools.compress(self.inputs, keep)) for keep in itertools.product(*keeps)]

    def _compile(self, given: tuple[str, ...], has_time_step: bool) -> str:
        def step(states, inputs, parameters, time_step):
            inputs, parameters = dict(zip(given, inputs)), dict(zip(self.parameters, parameters))
            return self.advance(states, inputs, parameters, time_step if has_time_step else None)

        sizes = len(self.states), len(given), len(self.parameters)
        return compile_program(self.name, step, *sizes, has_time_step).key

    def _refuse(self, fault: str):
        raise CellError(f"Cell {self.name!r} {fault}.")


def lrc(
    x,
    forget_input,
    update_input,
    elastance_input=0.0,
    *,
    activation_scale,
    activation_shift,
    forget_weight,
    update_weight,
    leak_conductance,
    leak_potential,
    elastance_weight,
    elastance_bias,
):
    """Liquid-resistance liquid-capacitance neuron with asymmetric elastance (arXiv 2505.21717, section 3)."""
    activation = (activation_scale * (x - activation_shift)).sigmoid()
    forget_gate = (leak_conductance + forget_input + forget_weight * activation).sigmoid()
    update = (leak_conductance + update_input + update_weight * activation).tanh()
    elastance = (elastance_weight * x + elastance_bias + elastance_input).sigmoid()
    return elastance * (leak_potential * update - forget_gate * x)


def lrc_symmetric(
    x,
    forget_input,
    update_input,
    elastance_input=0.0,
    *,
    activation_scale,
    activation_shift,
    forget_weight,
    update_weight,
    leak_conductance,
    leak_potential,
    elastance_weight,
    elastance_bias,
    elastance_shift,
):
    """The same with symmetric elastance."""
    activation = (activation_scale * (x - activation_shift)).sigmoid()
    forget_gate = (leak_conductance + forget_input + forget_weight * activation).sigmoid()
    update = (leak_conductance + update_input + update_weight * activation).tanh()
    drive = elastance_weight * x + elastance_bias + elastance_input
    elastance = (drive + elastance_shift).sigmoid() - (drive - elastance_shift).sigmoid()
    return elastance * (leak_potential * update - forget_gate * x)


def linear_lrc(x, forget_input, update_input, elastance_input=0.0, *, leak_conductance, leak_potential, elastance_bias):
    """LRC without its state in gates and elastance: linear in x, and never expanding."""
    forget_gate = (leak_conductance + forget_input).sigmoid()
    update = (leak_conductance + update_input).tanh()
    return (elastance_bias + elastance_input).sigmoid() * (leak_potential * update - forget_gate * x)


def oscillating_lrc(
    x,
    y,
    forget_input,
    elastance_input,
    update_input,
    quadrature_input,
    *,
    frequency,
    activation_scale,
    activation_shift,
    forget_weight,
    forget_bias,
    elastance_weight,
    elastance_bias,
    update_weight,
    update_bias,
    update_potential,
    quadrature_weight,
    quadrature_bias,
    quadrature_potential,
    time_step,
):
    """LRC with an inductance: a pair of states that turns by `frequency` radians per unit of time."""
    cosine, sine = (frequency * time_step).cos(), (frequency * time_step).sin()
    p, r = cosine * x - sine * y, sine * x + cosine * y
    activation = (activation_scale * (p - activation_shift)).sigmoid()
    forget_gate = (forget_bias + forget_input + forget_weight * activation).sigmoid()
    elastance = (elastance_bias + elastance_input + elastance_weight * p).sigmoid()
    update = (update_bias + update_input + update_weight * activation).tanh()
    quadrature = (quadrature_bias + quadrature_input + quadrature_weight * activation).tanh()
    pace = time_step * elastance
    return (
        p + pace * (update_potential * update - forget_gate * p),
        r + pace * (quadrature_potential * quadrature - forget_gate * r),
    )


def gru(h, reset_input, update_input, candidate_input, *, reset_weight, update_weight, candidate_weight):
    """Gated recurrent unit with diagonal recurrent weights (arXiv 1406.1078)."""
    reset = (reset_input + reset_weight * h).sigmoid()
    update = (update_input + update_weight * h).sigmoid()
    return update * ((candidate_input + candidate_weight * (reset * h)).tanh() - h)


def mgu(h, forget_input, candidate_input, *, forget_weight, candidate_weight):
    """Minimal gated unit with diagonal recurrent weights (arXiv 1603.09420)."""
    forget = (forget_input + forget_weight * h).sigmoid()
    return forget * ((candidate_input + candidate_weight * (forget * h)).tanh() - h)


def lstm(
    cell,
    h,
    forget_input,
    input_input,
    candidate_input,
    output_input,
    *,
    forget_weight,
    input_weight,
    candidate_weight,
    output_weight,
):
    """Long short-term memory with diagonal recurrent weights: a cell, and the output h that its gates read."""
    forget_gate = (forget_input + forget_weight * h).sigmoid()
    input_gate = (input_input + input_weight * h).sigmoid()
    candidate = (candidate_input + candidate_weight * h).tanh()
    output_gate = (output_input + output_weight * h).sigmoid()
    following = forget_gate * cell + input_gate * candidate
    return following - cell, output_gate * following.tanh() - h


LRC = Cell(lrc)
LRC_SYMMETRIC = Cell(lrc_symmetric)
LINEAR_LRC = Cell(linear_lrc)
OSCILLATING_LRC = Cell(oscillating_lrc, states=2)
GRU = Cell(gru)
MGU = Cell(mgu)
LSTM = Cell(lstm, states=2)

# What a model can be made of, by the name in its configuration. For "lrc", the other fields say which of its kinds.
REGISTERED = {"lrc": LRC, "gru": GRU, "mgu": MGU, "lstm": LSTM}


def register_cell(name: str, cell: Cell) -> None:
    """Makes `cell` known to models as `LrcSSMConfig(cell=name)`. A saved model does not hold the cell: it has to be
    registered before the model is loaded.

    Raises:
        ValueError: the name is no word or that of another cell, or the cell is no `Cell`.
    """
    if not isinstance(cell, Cell):
        raise ValueError(f"`cell` must be a `Cell`, got {type(cell).__name__}; pass `Cell(function)`.")
    if not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f"`name` must be a word, got {name!r}.")
    if REGISTERED.get(name, cell) is not cell:
        raise ValueError(f"`name` {name!r} is that of another cell: {REGISTERED[name]}.")
    REGISTERED[name] = cell
