"""Completion of ``kai-verl`` in a shell: commands, the options of each, the keys of runs, and files.

::

    kai-verl completion bash > ~/.local/share/bash-completion/completions/kai-verl
    kai-verl completion zsh > DIR/_kai-verl                                         # DIR being one of $fpath
    kai-verl completion fish > ~/.config/fish/completions/kai-verl.fish

In: the commands' own help, and the declared settings. Out: a script that starts no Python, so a new version of kai-verl
needs a new one.
"""

import io
import re
from contextlib import redirect_stdout, suppress
from importlib import import_module

from recipe.onpolicy_distill.cli import COMMANDS
from verl.config import PPOConfig
from verl.config.schema import all_keys
from verl.utils.console import command_parser

# What follows "=" is a word of its own to bash.
BASH = """_kai_verl() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD - 1]}}" words=""
    case "$COMP_CWORD ${{COMP_WORDS[1]}}" in
        "1 "*) words="{names}" ;;
        *" distill" | *" plan") [[ "$current" == "=" || "$before" == "=" ]] || words="{keys}" ;;
{cases}
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
    [[ "${{COMPREPLY[*]}}" != *= ]] || compopt -o nospace
}}
complete -o default -F _kai_verl kai-verl"""
BASH_CASE = """        *" {name}") [[ "$current" != -* ]] || words="{options}" ;;"""
ZSH = """#compdef kai-verl
case "$CURRENT $words[2]" in
    "2 "*) compadd -- {names} ;;
    *" distill" | *" plan") if compset -P '*='; then _files; else compadd -S '' -- {keys}; fi ;;
{cases}
esac"""
ZSH_CASE = """    *" {name}") if [[ "$PREFIX" == -* ]]; then compadd -- {options}; else _files; fi ;;"""
FISH = """complete -c kai-verl -n __fish_use_subcommand -f -a '{names}'
complete -c kai-verl -n '__fish_seen_subcommand_from distill plan' -a '{keys}'
{cases}"""
FISH_CASE = """complete -c kai-verl -n '__fish_seen_subcommand_from {name}; \
and string match -q -- "-*" (commandline -ct)' -f -a '{options}'"""
SHELLS = {"bash": (BASH, BASH_CASE), "zsh": (ZSH, ZSH_CASE), "fish": (FISH, FISH_CASE)}


def options_of(name: str) -> list[str]:
    """The long options in the help of a command."""
    with redirect_stdout(io.StringIO()) as text, suppress(SystemExit):
        import_module(COMMANDS[name].module).main(["--help"])
    return re.findall(r"^  (?:-\w, )?(--[\w-]+)", text.getvalue(), re.MULTILINE)


def script(shell: str) -> str:
    """The completion script of a shell."""
    whole, case = SHELLS[shell]
    others = [name for name in COMMANDS if name not in ("distill", "plan")]
    return whole.format(
        names=" ".join(COMMANDS),
        keys=" ".join(f"{key}=" for key in all_keys(PPOConfig) if ".NAME." not in key),
        cases="\n".join(case.format(name=name, options=" ".join(options_of(name))) for name in others),
    )


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = command_parser("recipe.onpolicy_distill.completion", __doc__)
    parser.add_argument("shell", choices=SHELLS)
    print(script(parser.parse_args(argv).shell))


if __name__ == "__main__":
    main()
