"""FLOPs of a step, held against what can be worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bsprof.measure import flops
from bsprof.measure.loop import Stage


def steps_of(model: nn.Module, inputs: torch.Tensor, *, on_data: bool = False) -> tuple[Stage, ...]:
    """Return the stages of a step that trains `model`; `on_data` multiplies matrices while the data is made."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held: dict[str, torch.Tensor] = {}

    def data() -> None:
        held["inputs"] = inputs @ torch.eye(inputs.shape[-1]) if on_data else inputs

    def forward() -> None:
        output = model(held["inputs"])
        held["loss"] = (output[0] if isinstance(output, tuple) else output).square().mean()

    def backward() -> None:
        held["loss"].backward()

    def optimize() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return ("data", data), ("h2d", lambda: None), ("forward", forward), ("backward", backward), ("optimizer", optimize)


def test_a_linear_layer_multiplies_once_forward_and_once_for_the_weights_gradient():
    # The input needs no gradient; the second layer's input does.
    once = 2 * 4 * 6 * 5
    assert flops.count(steps_of(nn.Linear(6, 5), torch.randn(4, 6))) == 2 * once
    two = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    assert flops.count(steps_of(two, torch.randn(4, 6))) == 2 * once + 3 * (2 * 4 * 5 * 3)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_grouped_convolution_costs_backward_twice_what_it_costs_forward(groups, stride):
    first = nn.Conv2d(3, 8, 1)
    grouped = nn.Conv2d(8, 8, 3, groups=groups, stride=stride, bias=False)
    side = (8 - 1) // stride + 1
    pointwise = 2 * 2 * 10 * 10 * 3 * 8
    once = 2 * 2 * side * side * 8 * (8 // groups) * 9
    inputs = torch.randn(2, 3, 10, 10)
    assert flops.count(steps_of(nn.Sequential(first, grouped), inputs)) == 2 * pointwise + 3 * once


def test_a_transposed_convolution_is_counted_over_its_input():
    transposed = nn.ConvTranspose2d(8, 4, 2, stride=2)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), transposed)
    pointwise = 2 * 2 * 5 * 5 * 3 * 8
    assert flops.count(steps_of(model, torch.randn(2, 3, 5, 5))) == 2 * pointwise + 3 * (2 * 2 * 5 * 5 * 8 * 4 * 4)


def test_a_whole_network_costs_three_times_its_forward_less_the_first_layers_input_gradient():
    """A stem, a block of MobileNet's (expand, depthwise, project) with its shortcut, and a classifier."""

    class Residual(nn.Sequential):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs + super().forward(inputs)

    depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
    block = Residual(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6(), depthwise, nn.Conv2d(24, 8, 1))
    pool = nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), block, pool, nn.Flatten(), nn.Linear(8, 10))
    products: list[int] = []

    def note(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        """Each element of the output is a sum over one filter, or one row of the weights."""
        products.append(2 * output.numel() * layer.weight[0].numel())

    hooks = [layer.register_forward_hook(note) for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    stages = steps_of(model, torch.randn(2, 3, 32, 32))
    for _, run in stages:
        run()
    for hook in hooks:
        hook.remove()
    assert flops.count(stages) == 3 * sum(products) - products[0]


def test_data_and_optimizer_are_not_counted_but_run():
    model = nn.Linear(6, 5)
    before = model.weight.detach().clone()
    assert flops.count(steps_of(model, torch.randn(4, 6), on_data=True)) == 2 * (2 * 4 * 6 * 5)
    assert not torch.equal(model.weight, before)


def test_counting_is_a_training_step_like_any_other():
    torch.manual_seed(0)
    inputs = torch.randn(4, 3, 8, 8)
    counted, plain = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)) for _ in "ab"
    )
    plain.load_state_dict(counted.state_dict())
    assert flops.count(steps_of(counted, inputs))
    for _, run in steps_of(plain, inputs):
        run()
    for name, value in plain.state_dict().items():
        assert torch.equal(counted.state_dict()[name], value), name
    assert all(parameter.grad is None for parameter in counted.parameters())


def test_a_model_without_products_has_none():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(6))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs * self.factor

    assert flops.count(steps_of(Scale(), torch.randn(4, 6))) == 0


def test_a_product_without_a_formula_leaves_the_count_uncaptured():
    @torch.library.custom_op("bsprof_test::packed_matmul", mutates_args=())
    def packed_matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left @ right

    layer, inputs = nn.Linear(6, 6), torch.randn(4, 6)
    stages = [("forward", lambda: packed_matmul(layer(inputs).detach(), torch.eye(6))), ("backward", lambda: None)]
    assert flops.count(stages) is None


def test_a_recurrent_layer_never_counts_as_nothing():
    """On a CPU torch may run an LSTM as one operator without a formula, as cuDNN does on CUDA."""
    assert flops.count(steps_of(nn.LSTM(8, 16), torch.randn(5, 3, 8))) != 0


@pytest.mark.parametrize(
    ("name", "multiplies"),
    [
        *(
            (name, True)
            for name in ("_cudnn_rnn", "mkldnn_rnn_layer_backward", "_grouped_mm", "_int_mm", "deform_conv2d")
        ),
        *((name, True) for name in ("_weight_int8pack_mm", "_scaled_dot_product_attention_math_for_mps", "addbmm")),
        *((name, False) for name in ("cummax", "lgamma", "upsample_bilinear2d", "upsample_linear1d", "add", "nms")),
        *((name, False) for name in ("_thnn_fused_lstm_cell", "_cudnn_rnn_flatten_weight", "native_batch_norm")),
    ],
)
def test_an_operators_name_tells_whether_it_multiplies(name, multiplies):
    assert flops._multiplies(name) is multiplies


def test_without_forward_and_backward_nothing_is_captured():
    ran = []
    assert flops.count([("data", lambda: ran.append("data")), ("step", lambda: ran.append("step"))]) is None
    assert ran == ["data", "step"]


def test_a_compiled_model_counts_as_what_was_written_and_stays_compiled():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    inputs = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, backend="aot_eager")
    stages = steps_of(compiled, inputs)
    for _ in range(2):
        for _, run in stages:
            run()
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    assert flops.count(stages) == flops.count(steps_of(model, inputs)) != 0
    for _, run in stages:
        run()
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


def test_what_a_stage_raises_comes_through_and_leaves_no_mode_behind():
    def fail() -> None:
        raise LookupError("no batch")

    with pytest.raises(LookupError, match="no batch"):
        flops.count([("data", lambda: None), ("forward", fail), ("backward", lambda: None)])
    assert flops.count(steps_of(nn.Linear(6, 5), torch.randn(4, 6))) == 2 * (2 * 4 * 6 * 5)
