"""torch's own samples of its operators and modules (OpInfo, ModuleInfo): the same results and gradients by the rule, the
same exceptions, on our kernels.

An operator is taken up as soon as dlkern.nn.functional has it, a module as soon as dlkern.nn does. Of the hundreds of
samples that the max poolings have, every so many-th runs in each dtype, so that all are met over the dtypes.
"""

import functools
import re

import pytest
import torch
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import dlkern
import dlkern.nn.functional as F
from dlkern.testing import compare

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MOST_SAMPLES = 48
FAMILIES = re.compile(
    r"(max|avg)_pool[12]d|adaptive_(max|avg)_pool[12]d|lp_pool[12]d|batch_norm|dropout[123]?d?|linear|conv[12]d|"
    r"conv_transpose[12]d|cross_entropy|embedding|layer_norm|scaled_dot_product_attention"
)


def ours_of(name):
    name = name.removeprefix("nn.functional.")
    if name == "embedding":  # whose samples begin with the weight
        return lambda weight, index, **options: F.embedding(index, weight, **options)
    return getattr(F, name, None) if FAMILIES.fullmatch(name) else None


OPS = [op for op in op_db if op.name.startswith("nn.functional.") and ours_of(op.name) and not op.variant_test_name]
NAMES = [op.name.removeprefix("nn.functional.") for op in OPS]
# Which elements fall is dlkern's own affair.
DETERMINISTIC = [op for op in OPS if "dropout" not in op.name]
each_op = pytest.mark.parametrize("op", OPS, ids=NAMES)
each_deterministic = pytest.mark.parametrize("op", DETERMINISTIC, ids=[op.name[14:] for op in DETERMINISTIC])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def samples(op, dtype, reference=False):
    draw = op.reference_inputs if reference else op.sample_inputs
    found = [s for s in draw("cpu", dtype, requires_grad=True) if not s.kwargs.get("dropout_p")]
    step = max(1, len(found) // MOST_SAMPLES)
    return found[DTYPES.index(dtype) % step :: step]


def cast(value, dtype):
    """value with its floating-point tensors in dtype, as leaves of a new graph."""
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point():
            return value
        return value.detach().clone(memory_format=torch.preserve_format).to(dtype).requires_grad_(value.requires_grad)
    if isinstance(value, list | tuple):
        return type(value)(cast(v, dtype) for v in value)
    if isinstance(value, dict):
        return {k: cast(v, dtype) for k, v in value.items()}
    return value


def leaves_of(*values):
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.requires_grad:
                yield value
        elif isinstance(value, list | tuple):
            yield from leaves_of(*value)
        elif isinstance(value, dict):
            yield from leaves_of(*value.values())


def flat(value):
    """The tensors of an output: of a recurrent layer's (output, (h_n, c_n)), three."""
    if isinstance(value, tuple):
        for v in value:
            yield from flat(v)
    else:
        yield value


def run(function, args, kwargs, dtype, cotangent_dtype=None):
    """Outputs and gradients of a call in `dtype`."""
    args, kwargs = cast(args, dtype), cast(kwargs, dtype)
    outputs = list(flat(function(*args, **kwargs)))
    wanted = [o for o in outputs if o.requires_grad]
    gradients = ()
    if wanted:
        torch.manual_seed(3)
        cotangents = [torch.randn(o.shape, dtype=torch.float64).to(cotangent_dtype or dtype).to(o.dtype) for o in wanted]
        gradients = torch.autograd.grad(wanted, list(leaves_of(args, kwargs)), cotangents, allow_unused=True)
    return [*outputs, *gradients]


def shaken(value, generator):
    """Other values of the same signs and layouts: floating-point elements times factors between 7/8 and 9/8, so that all
    draws of a product of many count alike."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        factors = torch.rand(value.shape, generator=generator, dtype=torch.float64) / 4 + 0.875
        new = value.detach().clone(memory_format=torch.preserve_format)
        return new.copy_(new.double() * factors).requires_grad_(value.requires_grad)
    if isinstance(value, list | tuple):
        return type(value)(shaken(v, generator) for v in value)
    if isinstance(value, dict):
        return {k: shaken(v, generator) for k, v in value.items()}
    return value


def assert_agree(ours_function, theirs_function, args, kwargs, dtype):
    """Results by the rule; of float64, where nothing is wider, nearer than float32 could be. Where one draw of a handful
    of elements does not keep it, 64 draws tell chance from a fault, or 256 where a few of them make up the error, as of
    a softmax near saturation."""
    narrow = torch.float32 if dtype == torch.float64 else dtype
    draws, args, kwargs = [], cast(args, dtype), cast(kwargs, dtype)
    given = args, kwargs
    generator = torch.Generator().manual_seed(1)  # its own: run() seeds torch's
    for draw in range(257):
        ours = run(ours_function, args, kwargs, dtype)
        theirs = run(theirs_function, args, kwargs, dtype)
        measure = theirs
        if narrow != dtype:
            measure = run(theirs_function, cast(args, narrow), cast(kwargs, narrow), narrow, narrow)
        exact = run(theirs_function, args, kwargs, torch.float64, dtype)
        for a, e in zip(ours, theirs, strict=True):
            assert (a is None) == (e is None)
            assert a is None or (a.shape == e.shape and a.dtype == e.dtype)
            assert a is None or a.is_floating_point() or draw > 0 or torch.equal(a, e)
        draws.append([(a, m, r) for a, m, r in zip(ours, measure, exact) if a is not None and a.is_floating_point()])
        if draw in (0, 64, 256):
            rows = [row for triples in zip(*draws) for row in compare("result", *zip(*triples), narrow)]
            rows = [row for row in rows if row.region == "whole"]
            if all(row.ok for row in rows):
                return
        args, kwargs = (shaken(value, generator) for value in given)
    raise AssertionError(([row for row in rows if not row.ok], args, kwargs))


def column_of(calls):
    return {call.backend for call in calls}


@each_dtype
@each_deterministic
def test_samples(op, dtype):
    function, theirs = ours_of(op.name), op.op
    served = 0
    for sample in samples(op, dtype):
        args, kwargs = (sample.input, *sample.args), sample.kwargs
        with dlkern.trace() as calls:
            function(*cast(args, dtype), **cast(kwargs, dtype))
        assert len(calls) == 1, calls
        if column_of(calls) != {"cpu"}:  # max_norm and sparse, and what has no elements
            assert calls[0].reason
            assert op.name.endswith("embedding") or 0 in sample.input.shape, (calls, sample)
        served += column_of(calls) == {"cpu"}
        assert_agree(function, theirs, args, kwargs, dtype)
    assert served


@each_dtype
@pytest.mark.parametrize("op", [op for op in OPS if "dropout" in op.name], ids=lambda op: op.name[14:])
@pytest.mark.filterwarnings("ignore")
def test_dropout_samples(op, dtype):
    """Of random ops: shapes, dtypes, and that what is kept is scaled."""
    for sample in samples(op, dtype):
        p, training = sample.kwargs.get("p", 0.5), sample.kwargs.get("training", True)
        x = cast(sample.input, dtype)
        y, expected = ours_of(op.name)(x, *sample.args, **sample.kwargs), op.op(x, *sample.args, **sample.kwargs)
        assert y.shape == expected.shape and y.dtype == expected.dtype and y.requires_grad == expected.requires_grad
        kept = y != 0
        scale = 1 / (1 - p) if training and p < 1 else 1.0
        exact = x.detach().double() * scale
        rows = compare("kept", [y[kept]], [(x * scale)[kept]], [exact[kept]], dtype)
        assert all(row.ok for row in rows), rows


@each_op
def test_error_inputs(op):
    """Calls that torch refuses are refused with the same type of exception and the same words."""
    if op.error_inputs_func is None:
        pytest.skip("torch has no error inputs of this op")
    for error in op.error_inputs("cpu"):
        sample, raised = error.sample_input, []
        for function in (op.op, ours_of(op.name)):
            with pytest.raises(Exception) as caught:
                function(sample.input, *sample.args, **sample.kwargs)
            raised.append(caught.value)
        assert type(raised[0]) is type(raised[1]), raised
        assert str(raised[0]) == str(raised[1])


MODULES = [info for info in module_db if getattr(dlkern.nn, info.module_cls.__name__, None) and "Lazy" not in info.name]
# Torch's classes made of modules of ours, whose own samples run.
STACKS = nn.TransformerEncoder | nn.TransformerEncoderLayer | nn.Transformer
MODULES = [info for info in MODULES if not issubclass(info.module_cls, STACKS)]


def module_inputs(info, dtype, training):
    found = info.module_inputs_func(info, "cpu", dtype, True, training)
    if issubclass(info.module_cls, nn.RNNBase):  # many, and slow: all are met over the dtypes and modes
        return found[2 * DTYPES.index(dtype) + training :: 2 * len(DTYPES)]
    if dtype == torch.float16:  # but for the conversions its kernels are bfloat16's
        return found[:: 1 + len(found) // 8]
    return found


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@each_dtype
@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.module_cls.__name__)
def test_modules(info, dtype, training):
    """Built with the same arguments and parameters; outputs and the gradients of inputs and parameters."""
    name = info.module_cls.__name__
    if info.module_cls is nn.TransformerDecoderLayer and dtype == torch.bfloat16:
        pytest.skip("it normalises rows of 4 numbers: nearly equal ones amplify rounding without bound, torch's as ours")
    for inputs in module_inputs(info, dtype, training)[:MOST_SAMPLES]:
        built, call = inputs.constructor_input, inputs.forward_input
        if call is None:
            continue

        def on(namespace, built=built):
            @functools.cache  # a draw brings other parameters, not another module
            def module_of(dtype):
                return getattr(namespace, name)(*built.args, **cast(built.kwargs, dtype)).train(training).to(dtype)

            def function(values, args, kwargs):
                dtype = next((p.dtype for p in values.values()), None) or args[0].dtype
                return torch.func.functional_call(module_of(dtype), values, args, kwargs)

            return function

        torch.manual_seed(1)
        module = info.module_cls(*built.args, **built.kwargs)
        parameters = {k: p.detach().requires_grad_() for k, p in module.named_parameters()}
        assert_agree(on(dlkern.nn), on(nn), (parameters, call.args, call.kwargs), {}, dtype)


@pytest.mark.parametrize(
    "info", [info for info in MODULES if info.module_error_inputs_func], ids=lambda info: info.module_cls.__name__
)
def test_module_error_inputs(info):
    for error in info.module_error_inputs_func(info, "cpu", torch.float32, False, True):
        inputs, raised = error.module_error_input, []
        built, call = inputs.constructor_input, inputs.forward_input
        for namespace in (nn, dlkern.nn):
            with pytest.raises(Exception) as caught:
                module = getattr(namespace, info.module_cls.__name__)(*built.args, **built.kwargs)
                module(*call.args, **call.kwargs)
            raised.append(caught.value)
        assert type(raised[0]) is type(raised[1]), raised
