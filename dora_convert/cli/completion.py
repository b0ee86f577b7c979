"""dora-convert completion: completion of commands, options, paths and cached repos in bash, zsh and fish.

Click's script for bash completes either paths or words; a REF may be both. So bash gets a script of our own.
"""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, get_completion_class

from ..errors import OutputError, UsageError

VARIABLE = "_DORA_CONVERT_COMPLETE"
PLACES = {
    "bash": ("XDG_DATA_HOME", ".local/share", "bash-completion/completions/dora-convert"),
    "zsh": ("ZDOTDIR", "", ".zfunc/_dora-convert"),
    "fish": ("XDG_CONFIG_HOME", ".config", "fish/completions/dora-convert.fish"),
}
"""For each shell: the variable that names a folder, the folder below home without it, and the file."""
NEXT = {
    "bash": "new shells complete, if bash-completion is installed; without it: source {path} in ~/.bashrc",
    "zsh": "put into ~/.zshrc, before compinit: fpath+=({folder})",
    "fish": "new shells complete",
}
"""The next step after the installation."""


@add_completion_class
class BashPaths(BashComplete):
    """Completes words and paths together: a folder of models, or a repo of the cache."""

    source_template = """\
%(complete_func)s() {
    local IFS=$'\\n' answer word=${COMP_WORDS[COMP_CWORD]}
    COMPREPLY=()
    for answer in $(env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD="$COMP_CWORD" %(complete_var)s=bash_complete "$1"); do
        case ${answer%%%%,*} in
            file) compopt -o filenames 2>/dev/null; COMPREPLY+=($(compgen -f -- "$word")) ;;
            dir) compopt -o filenames 2>/dev/null; COMPREPLY+=($(compgen -d -- "$word")) ;;
            *) COMPREPLY+=("${answer#*,}") ;;
        esac
    done
}
complete -o nosort -F %(complete_func)s %(prog_name)s 2>/dev/null || complete -F %(complete_func)s %(prog_name)s
"""

    @staticmethod
    def _check_version() -> None:
        """Take any bash: the script does without what is new."""


def references(incomplete: str) -> list[CompletionItem]:
    """Return the completions of a REF: paths, and the models in the Hub's cache."""
    repos = [CompletionItem(repo) for repo in cached_repos() if repo.startswith(incomplete)]
    return [*repos, CompletionItem(incomplete, type="file")]


def cached_repos() -> list[str]:
    """Return the ids of the models in the Hub's cache, without an import of the Hub's client."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub"))
    names = sorted(path.name for path in cache.glob("models--*")) if cache.is_dir() else []
    return [name.removeprefix("models--").replace("--", "/") for name in names]


@click.command("completion")
@click.argument("action", type=click.Choice(["install", "show"]))
@click.argument("shell", type=click.Choice(list(PLACES)), required=False)
def completion(action: str, shell: str | None) -> None:
    """Complete commands, options, paths, cached repos and choices with the TAB key.

    SHELL is bash, zsh or fish; without it, the one that $SHELL names. `install` writes the script where the
    shell looks for it and prints the path; `show` prints the script.

    \b
    Examples:
      dora-convert completion install
      dora-convert completion show zsh > _dora-convert
    """
    shell = shell or Path(os.environ.get("SHELL", "")).name
    if shell not in PLACES:
        raise UsageError(f"The shell {shell or '(unknown)'} is not one of {', '.join(PLACES)}.", hint="name the shell")
    script = script_of(shell)
    if action == "show":
        click.echo(script)
        return
    path = place_of(shell)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from error
    click.echo(NEXT[shell].format(path=path, folder=path.parent), err=True)
    click.echo(str(path))


def script_of(shell: str) -> str:
    """Return the script of a shell."""
    kind = get_completion_class(shell)
    assert kind
    return kind(click.Command("dora-convert"), {}, "dora-convert", VARIABLE).source()


def place_of(shell: str) -> Path:
    """Return the file in which a shell looks for the script."""
    variable, below, file = PLACES[shell]
    return Path(os.environ.get(variable) or Path.home() / below) / file
