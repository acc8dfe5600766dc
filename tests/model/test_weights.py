"""Reading weights from files that are not as they should be."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from formats.errors import UsageError
from model.weights import Folder


def test_weights_in_eight_bits_are_refused_with_file_and_name(tmp_path: Path) -> None:
    save_file({"head": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    save_file({"experts": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "b.safetensors")
    with Folder(tmp_path) as folder:
        assert folder.dtype("head") == torch.bfloat16
        with pytest.raises(UsageError, match=r"b\.safetensors: experts is stored as F8_E4M3, .*; undo .* F32, BF16"):
            folder.dtype("experts")
