"""What holds for every op of every family: the cases of dlkern.testing.CASES, one promise a test."""

import functools
import io

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import dlkern
from dlkern.nn.functional._autocast import lowered
from dlkern.ops._registry import raw
from dlkern.testing import CASES as ALL_CASES
from dlkern.testing import Case, check

CASES = [case for case in ALL_CASES if hasattr(dlkern.nn.functional, case.op)]

IDS = [f"{case.family}-{case.name}".replace(" ", "_") for case in CASES]
FIRST = {case.op: case for case in reversed(CASES)}  # one case an op
each_case = pytest.mark.parametrize("case", CASES, ids=IDS)
each_op = pytest.mark.parametrize("case", FIRST.values(), ids=FIRST.keys())
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def draw(case: Case, dtype: torch.dtype = torch.float32, channels_last: bool = False, seed: int = 1) -> list:
    torch.manual_seed(seed)
    inputs = []
    for i, x in enumerate(case.inputs()):
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            y = x.detach().to(dtype)
            if channels_last and i == 0 and y.dim() == 4:
                y = y.contiguous(memory_format=torch.channels_last)
            x = y.requires_grad_(x.requires_grad)
        inputs.append(x)
    return inputs


def gradients(output: torch.Tensor, inputs: list) -> list[torch.Tensor]:
    torch.manual_seed(2)
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    return list(torch.autograd.grad(output, leaves, torch.randn_like(output)))


def same_bits(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.detach(), b.detach()) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    ("case", "channels_last"),
    [
        pytest.param(case, last, id=f"{name}-{'channels_last' if last else 'contiguous'}")
        for case, name in zip(CASES, IDS)
        for last in ((False, True) if case.images else (False,))
    ],
)
def test_parity(case, dtype, channels_last):
    def inputs():
        drawn = case.inputs()
        if channels_last:
            drawn[0] = drawn[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        return drawn

    # In float64 the reference is as inexact as what it judges: more draws, so that chance does not decide.
    draws = case.draws * (2 if dtype == torch.float64 else 1)
    for count in (draws, 8 * draws):  # over few, chance decides a border's largest error: more draws tell
        with dlkern.trace() as calls:
            certificate = check(case.ours, case.reference(dtype), inputs, dtype=dtype, draws=count, name=case.name)
        assert {call.backend for call in calls} == {"cpu"}, calls
        if certificate.ok:
            break
    certificate.raise_if_failed()


@each_case
def test_layout_and_dtype_are_torchs(case):
    for channels_last in (False, True) if case.images else (False,):
        inputs = draw(case, torch.float32, channels_last)
        ours, theirs = case.ours(*inputs), case.theirs(*inputs)
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert ours.stride() == theirs.stride()
        for a, b, x in zip(gradients(ours, inputs), gradients(theirs, inputs), inputs, strict=False):
            assert a.dtype == b.dtype and a.shape == b.shape, x.shape


@each_op
def test_meta_tensors_tell_shapes(case):
    """On the meta device there is nothing to compute, and no autocast to ask for."""
    inputs = [x.detach().to("meta") if isinstance(x, torch.Tensor) else x for x in draw(case)]
    ours, theirs = case.ours(*inputs), case.theirs(*inputs)
    assert ours.is_meta and ours.shape == theirs.shape and ours.dtype == theirs.dtype


@each_op
def test_jit_trace(case):
    """torch.jit.trace records raw ops: the graph is the same each time, can be saved, and gives the same bits."""
    inputs = draw(case)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for i, p in enumerate(inputs[1:]):
                self.register_parameter(str(i), torch.nn.Parameter(p.detach(), requires_grad=p.requires_grad))

        def forward(self, x):
            return case.ours(x, *self.parameters())

    model, x = Model(), inputs[0].detach()
    torch.manual_seed(3)
    expected = model(x)
    traced = torch.jit.trace(model, x, check_trace="dropout" not in case.op)
    assert any(node.kind().startswith("dlkern::") for node in traced.inlined_graph.nodes())
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.manual_seed(3)
    assert same_bits([torch.jit.load(file)(x)], [expected])


@each_case
def test_opcheck(case):
    """Schemas, fake kernels and aliasing of the raw ops, on the arguments real calls give them."""
    seen = record_raw_calls(case)
    assert seen
    for op, args in seen:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def record_raw_calls(case: Case) -> list:
    """The raw ops one forward and backward of the case calls, with their (detached) arguments."""
    seen = []
    originals = {}

    def spy(op):
        def call(*args):
            seen.append((op, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)))
            return op(*args)

        return call

    for name, columns in raw.items():
        originals[name] = columns["cpu"]
        columns["cpu"] = spy(columns["cpu"])
    try:
        inputs = draw(case)
        gradients(case.ours(*inputs), inputs)
    finally:
        for name, op in originals.items():
            raw[name]["cpu"] = op
    return seen


@each_op
def test_gradcheck_and_gradgradcheck(case):
    inputs = draw(case, torch.float64)
    # By random projections; each family's own tests do it element by element on smaller inputs.
    assert torch.autograd.gradcheck(case.ours, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(case.ours, inputs, fast_mode=True)


@each_op
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(case, backend):
    torch._dynamo.reset()
    inputs = draw(case)
    expected = case.ours(*inputs)
    compiled = torch.compile(case.ours, fullgraph=True, backend=backend)(*inputs)
    assert same_bits([expected, *gradients(expected, inputs)], [compiled, *gradients(compiled, inputs)])


@each_op
def test_compile_dynamic_makes_one_graph(case):
    torch._dynamo.reset()
    compiled = torch.compile(case.ours, fullgraph=True, dynamic=True, backend="aot_eager")
    # Sizes that are equal by chance are not the same size.
    apart = torch.fx.experimental._config.patch(use_duck_shape=False)
    with torch._dynamo.config.patch(error_on_recompile=True), apart:
        for repeat in (2, 3, 5):
            inputs = draw(case)
            batch = [torch.cat([inputs[0].detach()] * repeat).requires_grad_(), *inputs[1:]]
            if case.op == "cross_entropy":
                batch[1] = torch.cat([inputs[1]] * repeat)
            if case.family == "attention":
                batch[1:] = [torch.cat([x.detach()] * repeat).requires_grad_() if x.dim() > 1 else x for x in inputs[1:]]
            if case.op == "conv2d_act":  # the residual
                batch[3] = torch.cat([inputs[3].detach()] * repeat).requires_grad_()
            expected, ours = case.ours(*batch), compiled(*batch)
            assert same_bits([expected, *gradients(expected, batch)], [ours, *gradients(ours, batch)])


def functional_gradient(f, inputs):
    index = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor) and x.requires_grad]
    tensors = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    return torch.func.grad(lambda *t: f(*t).pow(2).sum(), argnums=tuple(index))(*tensors)


def widened(inputs):
    return [
        x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in inputs
    ]


def assert_by_the_rule(case, ours, theirs):
    """Lists of results of functions of the case's inputs, over more draws where few leave too much to chance."""
    for count in (case.draws, 8 * case.draws):
        drawn = [draw(case, seed=seed) for seed in range(1, 1 + count)]
        results = [zip(ours(x), theirs(x), theirs(widened(x)), strict=True) for x in drawn]
        columns = zip(*results, strict=True)
        rows = [
            row for i, draws in enumerate(columns)
            for row in dlkern.testing.compare(f"result {i}", *map(list, zip(*draws, strict=True)), torch.float32)
        ]  # fmt: skip
        if all(row.ok for row in rows):
            break
    assert all(row.ok for row in rows), [row for row in rows if not row.ok]


@each_op
def test_func_grad_eager_and_compiled(case):
    gradient = functools.partial(functional_gradient, case.ours)
    theirs = functools.partial(functional_gradient, case.theirs)
    assert_by_the_rule(case, gradient, theirs)
    torch._dynamo.reset()
    assert_by_the_rule(case, torch.compile(gradient, fullgraph=True, backend="aot_eager"), theirs)


@each_op
@pytest.mark.filterwarnings("ignore:.*performance drop.*")
def test_vmap_and_vmap_of_grad(case):
    def mapped(f, differentiate, inputs):
        first, *rest = (x.detach() if isinstance(x, torch.Tensor) else x for x in inputs)
        stacked = torch.stack([first, first.flip(0), first * 2])
        if differentiate:
            return [torch.func.vmap(torch.func.grad(lambda x: f(x, *rest).pow(2).sum()))(stacked)]
        return [torch.func.vmap(lambda x: f(x, *rest))(stacked)]

    reference = case.plain if case.family == "rnn" else case.theirs  # torch has no batching rule for its own
    for differentiate in (False, True):
        ours, theirs = (functools.partial(mapped, f, differentiate) for f in (case.ours, reference))
        assert_by_the_rule(case, ours, theirs)


@each_case
def test_forward_mode(case):
    """Jacobian-vector products are the reference's, and trace() says so."""
    drawn = draw(case, torch.float64)
    tangents = {i: torch.randn_like(x) for i, x in enumerate(drawn) if isinstance(x, torch.Tensor) and x.requires_grad}
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in drawn]

    def product(f):
        def of(*tensors):
            full = list(inputs)
            for i, x in zip(tangents, tensors):
                full[i] = x
            return f(*full)

        return torch.func.jvp(of, tuple(inputs[i] for i in tangents), tuple(tangents.values()))

    with dlkern.trace() as calls:
        ours = product(case.ours)
    assert {(c.backend, c.reason) for c in calls} == {("reference", "forward-mode differentiation")}
    # torch has no forward mode of its fused attention and recurrent layers.
    with sdpa_kernel(SDPBackend.MATH):
        theirs = product(case.plain if case.family == "rnn" else case.theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(x, tangents[i]) if i in tangents else x for i, x in enumerate(inputs)]
        result = torch.autograd.forward_ad.unpack_dual(case.ours(*duals))
    torch.testing.assert_close(result.tangent, theirs[1])


class Tagged(torch.Tensor):
    """A subclass as fastai's TensorImage is one: it makes the results of all functions its own."""


@each_op
@pytest.mark.parametrize("kind", ["subclass", "vmap"])
@pytest.mark.filterwarnings("ignore:.*performance drop.*")
def test_what_comes_back_may_be_written_to(case, kind):
    """As ReLU(inplace=True) does with what it gets."""
    first, *rest = draw(case)
    if kind == "subclass":
        tagged = first.detach().as_subclass(Tagged).requires_grad_(first.requires_grad)
        y = case.ours(tagged, *rest)
        assert type(y) is Tagged and y.requires_grad
    else:
        y = torch.func.vmap(lambda x: case.ours(x, *rest).add_(1))(torch.stack([first, first]))
    y.add_(1)


@each_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_dtypes(case, dtype):
    inputs = draw(case)
    with torch.autocast("cpu", dtype):
        ours = case.ours(*inputs)
        # torch's own LSTM of autocast raises in what its oneDNN lacks: float16 (torch 2.13), without AVX-512 bfloat16 too.
        lacks = dtype == torch.float16 or torch.backends.cpu.get_cpu_capability() != "AVX512"
        theirs = case.plain(*lowered(*inputs)) if case.op == "lstm" and lacks else case.theirs(*inputs)
    assert ours.dtype == theirs.dtype
    for a, b in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        assert a.dtype == b.dtype


ALLOWED_ATEN = {
    # allocation, views and copies: nothing that computes
    "empty", "empty_strided", "empty_like", "new_empty", "detach", "view", "reshape", "alias", "as_strided", "contiguous",
    "clone", "copy_", "to", "_to_copy", "zeros", "zero_", "fill_", "new_zeros", "t", "transpose", "permute", "unsqueeze",
    "squeeze", "expand", "select", "slice", "result_type", "is_nonzero", "item", "_local_scalar_dense", "lift_fresh",
    "_unsafe_view", "resize_", "set_", "full", "new_full", "ones", "ones_like", "flatten", "zeros_like",
    "pad", "constant_pad_nd", "narrow", "cat", "stack", "unbind",
}


@each_case
def test_no_aten_compute(case):
    """Under the profiler, no aten op that computes appears in a forward or backward on our kernels."""
    inputs = draw(case)
    cotangent = torch.ones_like(case.ours(*inputs))
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        torch.autograd.grad(case.ours(*inputs), leaves, cotangent)
    names = {event.name.removeprefix("aten::") for event in prof.events() if event.name.startswith("aten::")}
    both = {"add_"} if "both ways" in case.label else set()  # autograd adds what the directions give their input
    assert names <= ALLOWED_ATEN | both, names - ALLOWED_ATEN
    assert any(event.name.startswith("dlkern::") for event in prof.events())


@each_op
def test_a_weight_changed_in_place_is_seen(case):
    inputs = draw(case)
    floats = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    with torch.no_grad():
        before = case.ours(*inputs)
        for x in floats:
            x.data[:] -= 0.5 * torch.randn_like(x)  # changes neither version nor address
        after = case.ours(*inputs)
        fresh = case.ours(*[x.detach().clone() if isinstance(x, torch.Tensor) else x for x in inputs])
    assert not torch.equal(before, after)
    assert same_bits([after], [fresh])


NONSENSE = (
    lambda t: t.reshape(-1)[:0], lambda t: t.reshape(-1), lambda t: t[..., None, None], lambda t: t.to(torch.int32),
    lambda t: t.to(torch.complex64), lambda t: t.to(torch.float16), lambda t: t.to(torch.float8_e4m3fn),
    lambda t: t[..., :1] if t.dim() else t,
    lambda t: t.new_zeros(()), lambda t: -t if t.dtype != torch.bool else t, lambda t: t.new_zeros(0, 0, 0, 0),
    lambda t: t.to("meta"), lambda t: t.expand(3, *t.shape),
    lambda t: t.to(torch.float64 if t.dtype != torch.float64 else torch.float32),
    lambda t: t.to_sparse() if t.dim() else t,
)
WRONG_INTS = ([], [0, 0], [-1, -1], [1], [2**40, 2**40], [1, 2, 3], [2**62, 2**62])


@each_case
def test_raw_ops_called_with_nonsense_raise_or_work_but_never_crash(case):
    for op, args in record_raw_calls(case):
        for i, arg in enumerate(args):
            if isinstance(arg, torch.Tensor):
                wrongs = [change(arg) for change in NONSENSE]
            elif isinstance(arg, list | tuple | torch.Size):
                wrongs = [*WRONG_INTS]
            elif isinstance(arg, bool):
                wrongs = [not arg]
            elif isinstance(arg, int):
                wrongs = [-1, 0, 7, 2**62, -(2**62)]
            elif isinstance(arg, float):
                wrongs = [float("nan"), float("inf"), -1.0]
            else:
                wrongs = [torch.zeros(0), torch.zeros(2, 3), torch.zeros(3, dtype=torch.float64)]
            for wrong in wrongs:
                changed = [*args[:i], wrong, *args[i + 1 :]]
                try:
                    op(*changed)
                except (RuntimeError, ValueError, IndexError, NotImplementedError, TypeError, MemoryError, OverflowError):
                    pass
