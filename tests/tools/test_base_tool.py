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
    assert look.get_openai_tool_schema()["function"]["name"] == "look"
    instance_id, _ = await look.create()
    response, reward, _ = await look.execute(instance_id, {})
    await look.release(instance_id)
    assert (response.text, reward) == ("red", None)
    assert (await look.create())[0] != instance_id
    assert (await look.create("mine"))[0] == "mine"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "expected a list of tools under the key 'tools'"),
        ("tools: []", "expected a list of tools"),
        ("tools: [3]", r"tools\[0\]: expected a mapping with class_name"),
        ("tools: [{class_name: support.agent_loop_fakes.TextTool, shema: {}}]", "unknown keys shema"),
        ("tools: [{class_name: support.agent_loop_fakes.No}]", "=support.agent_loop_fakes.No cannot be loaded"),
        ("tools: [{class_name: no_such_module.Tool}]", "=no_such_module.Tool cannot be loaded"),
        ("tools: [{class_name: TextTool}]", "class_name=TextTool names no module"),
        ("tools: [{class_name: support.agent_loop_fakes.ScriptedEngine}]", "no subclass of verl.tools.base_tool.Base"),
        ("tools: [{class_name: support.agent_loop_fakes.TextTool}]", "TextTool has no tool_schema"),
        (LOOK.replace(SCHEMA, "{type: function}").join(("tools: [", "]")), "it must look like"),
        (f"tools: [{LOOK}, {LOOK}]", "several tools are called look"),
    ],
)
def test_a_wrong_file_says_what_is_wrong_with_it(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        initialize_tools_from_config(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"multi_turn\.tool_config_path=.*nothing\.yaml: there is no such file"):
        initialize_tools_from_config(tmp_path / "nothing.yaml")
