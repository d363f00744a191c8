from __future__ import annotations

from collections.abc import Iterator

import pytest

import onnx_kernels


@pytest.fixture(scope="module", params=onnx_kernels.PROCESSORS, name="onnx_kernels")
def _onnx_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Makes `onnx_kernels.check` run on this machine's kernels, then on those of each emulated processor."""
    kernels = onnx_kernels.Here() if request.param == "here" else onnx_kernels.Emulated(request.param)
    onnx_kernels.current[:] = [kernels]
    yield
    onnx_kernels.current.clear()
    kernels.close()
