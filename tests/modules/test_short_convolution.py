import pytest
import torch

from xlm_hf.modules.attention_patterns import attention_pattern, shifted_neighbors
from xlm_hf.modules.short_convolution import ShortConvolution


@pytest.mark.parametrize(("kernel_size", "is_causal"), [(3, False), (5, False), (4, True), (1, False)])
@pytest.mark.parametrize("hides", ["nothing", "padding", "documents", "blocks", "all"])
def test_convolution_equals_a_loop(kernel_size, is_causal, hides):
    generator = torch.Generator().manual_seed(0)
    conv = ShortConvolution(6, kernel_size, is_causal)
    conv.weight.data = torch.randn(kernel_size, 6, generator=generator)
    x = torch.randn(2, 7, 6, generator=generator)
    exists = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]) if hides in ("padding", "all") else None
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]]) if hides in ("documents", "all") else None
    blocks = torch.tensor([[0, 0, 1, 1, 0, 1, 2], [0, 1, 1, 1, 2, 2, 2]]) if hides in ("blocks", "all") else None
    allowed = shifted_neighbors(conv.offsets, attention_pattern(segments, blocks), exists, x)
    output = conv(x, None if allowed is None else allowed[..., None].to(x.dtype))

    def sees(b, t, s):
        return (
            0 <= s < 7
            and (exists is None or exists[b, s])
            and (segments is None or segments[b, s] == segments[b, t])
            and (blocks is None or blocks[b, s] <= blocks[b, t])
        )

    for b in range(2):
        for t in range(7):
            if exists is not None and not exists[b, t]:
                continue
            expected = x[b, t].clone()
            for tap in range(kernel_size):
                s = t + tap - (kernel_size - 1 if is_causal else kernel_size // 2)
                if sees(b, t, s):
                    expected += conv.weight[tap] * x[b, s]
            torch.testing.assert_close(output[b, t], expected)
