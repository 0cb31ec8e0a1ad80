"""Tools from YAML, and the errors of a YAML that is wrong."""

from pathlib import Path

import pytest

from verl.tools.base_tool import initialize_tools_from_config

SCHEMA = "{type: function, function: {name: look, parameters: {type: object, properties: {}}}}"
LOOK = f"{{class_name: support.agent_loop_fakes.TextTool, config: {{text: red}}, tool_schema: {SCHEMA}}}"


def write(folder: Path, text: str) -> Path:
    path = folder / "tools.yaml"
    path.write_text(text, encoding="utf-8")
    return path


async def test_tools_are_built_with_config_and_schema_and_instances_have_ids_of_their_own(tmp_path: Path) -> None:
    path = write(tmp_path, f"tools: [{LOOK}, {{class_name: support.agent_loop_fakes.AddTool}}]")
    look, add = initialize_tools_from_config(path)
    assert (look.name, add.name) == ("look", "add")
    assert look.get_openai_tool_schema().function.name == "look"
    instance_id, _ = await look.create()
    response, reward, _ = await look.execute(instance_id, {})
    await look.release(instance_id)
    assert (response.text, reward) == ("red", None)
    assert (await look.create())[0] != instance_id
    assert (await look.create("mine"))[0] == "mine"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "Field required"),
        ("tools: [{class_name: support.agent_loop_fakes.TextTool, shema: {}}]", r"tools.0.shema\n.*not permitted"),
        ("tools: [{class_name: support.agent_loop_fakes.No}]", "agent_loop_fakes defines no 'No'"),
        ("tools: [{class_name: TextTool}]", "class_name=TextTool is no module.Class"),
        ("tools: [{class_name: support.agent_loop_fakes.ScriptedEngine}]", "no module.Class of a verl.tools.base_tool"),
        ("tools: [{class_name: support.agent_loop_fakes.TextTool}]", "TextTool: tool_schema=None must look like"),
    ],
)
def test_a_wrong_file_says_what_is_wrong_with_it(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(ValueError, match=rf"multi_turn\.tool_config_path=.*tools\.yaml: (?s:.*){error}"):
        initialize_tools_from_config(write(tmp_path, text))
