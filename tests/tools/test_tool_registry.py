"""Tools from YAML, and what is said of a YAML that is wrong."""

from pathlib import Path

import pytest

from verl.tools.registry import initialize_tools_from_config

SCHEMA = "{type: function, function: {name: echo, parameters: {type: object, properties: {}}}}"
ECHO = f"{{class_name: tools_for_tests.EchoTool, tool_schema: {SCHEMA}}}"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def write(folder: Path, text: str) -> Path:
    path = folder / "tools.yaml"
    path.write_text(text, encoding="utf-8")
    return path


async def test_tools_are_built_with_config_and_schema(tmp_path: Path) -> None:
    entry = f"{{class_name: tools_for_tests.EchoTool, config: {{prefix: '> '}}, tool_schema: {SCHEMA}}}"
    path = write(tmp_path, f"tools: [{entry}, {{class_name: tools_for_tests.OwnSchemaTool}}]")
    echo, own = initialize_tools_from_config(path)
    assert (echo.name, own.name) == ("echo", "own")
    assert echo.get_openai_tool_schema()["function"]["name"] == "echo"
    instance_id, _ = await echo.create()
    response, reward, _ = await echo.execute(instance_id, {"x": 1})
    await echo.release(instance_id)
    assert (response.text, reward) == ("> {'x': 1}", None)


async def test_instances_have_ids_of_their_own(tmp_path: Path) -> None:
    (echo,) = initialize_tools_from_config(write(tmp_path, f"tools: [{ECHO}]"))
    assert (await echo.create())[0] != (await echo.create())[0]
    assert (await echo.create("mine"))[0] == "mine"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "expected a list of tools under the key 'tools'"),
        ("tools: []", "expected a list of tools"),
        ("tools: [3]", r"tools\[0\]: expected a mapping with class_name"),
        ("tools: [{class_name: tools_for_tests.EchoTool, shema: {}}]", "unknown keys shema"),
        ("tools: [{class_name: tools_for_tests.Missing}]", "tools_for_tests.Missing cannot be loaded"),
        ("tools: [{class_name: no_such_module.Tool}]", "no_such_module.Tool cannot be loaded"),
        ("tools: [{class_name: EchoTool}]", "class_name=EchoTool names no module"),
        ("tools: [{class_name: tools_for_tests.NoTool}]", "no subclass of verl.tools.base_tool.BaseTool"),
        ("tools: [{class_name: tools_for_tests.EchoTool}]", "EchoTool has no tool_schema"),
        ("tools: [{class_name: tools_for_tests.EchoTool, tool_schema: {type: function}}]", "it must look like"),
        (f"tools: [{ECHO}, {ECHO}]", "several tools are called echo"),
    ],
)
def test_a_wrong_file_says_what_is_wrong_with_it(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        initialize_tools_from_config(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"multi_turn\.tool_config_path=.*nothing\.yaml: there is no such file"):
        initialize_tools_from_config(tmp_path / "nothing.yaml")
