import socket

import pytest

from formats.errors import BuildError
from pipelines.materialise import Settings, ShardTask, build_shard
from pipelines.tools import refuse_other_tools, tool_versions
from recipes.schema import Recipe


def test_a_machine_with_the_same_tools_is_taken():
    refuse_other_tools(dict(tool_versions()))


def test_a_machine_with_another_decoder_is_named():
    pillow = tool_versions()["pillow"]
    with pytest.raises(BuildError, match=f"{socket.gethostname()} has pillow {pillow}, not 9.0.0"):
        refuse_other_tools({**tool_versions(), "pillow": "9.0.0"})


def test_no_shard_is_made_with_other_tools(tmp_path):
    recipe = Recipe.model_validate(
        {"name": "r", "tokenizer": "t", "components": {"a": {"source": "llava15", "count": "all"}}}
    )
    settings = Settings(recipe, str(tmp_path), "", {}, {}, {}, {}, tools={})
    with pytest.raises(BuildError, match="install the same on every machine"):
        build_shard(ShardTask(settings, 0, "", 0, 1, 0))
    assert not list(tmp_path.iterdir())
