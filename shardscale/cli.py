"""The `shardscale` command."""

# No `from __future__ import annotations` here: typer reads the annotations of
# the commands, and their names exist only inside the function that wires them.

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    import typer

__all__ = ["main"]


def main() -> None:
    """Run the command line; the process ends with its exit code."""
    if sys.argv[1:2] == ["doctor"]:
        # It must work where the extras are not installed, so it is no command of typer's.
        from shardscale.doctor.command import main as examine

        examine(sys.argv[2:])
    missing = [name for name in ("rich", "sklearn", "typer") if find_spec(name) is None]
    if missing:
        print(
            f"shardscale: the command line needs {', '.join(missing)}, which is not installed. "
            "Run: pip install 'shardscale[demo]'",
            file=sys.stderr,
        )
        sys.exit(2)
    _make_app()(prog_name="shardscale")


def _make_app() -> "typer.Typer":
    """Wire the commands; what they need is imported here, at the last moment."""
    import typer

    import shardscale
    from shardscale.demo import flags
    from shardscale.demo.options import OptionError, check_json, check_options
    from shardscale.demo.play import play
    from shardscale.demo.start import RankError, default_ranks

    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        epilog="`shardscale doctor` examines a job: start it as you start your training.",
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"shardscale {shardscale.__version__}")
            raise typer.Exit

    @app.callback()
    def root(
        version: Annotated[
            bool,
            typer.Option("--version", callback=show_version, is_eager=True, help="Show it."),
        ] = False,
    ) -> None:
        """A gradient scaler for sharded training."""

    @app.command()
    def demo(
        ranks: flags.Ranks = None,
        wrap: flags.Wrap = None,
        optimizer: flags.Optimizer = None,
        scaler: flags.Scaler = None,
        inject: flags.Inject = None,
        steps: flags.Steps = 150,
        json: flags.Json = None,
    ) -> None:
        """Train a small model in float16 on several ranks, and overflow one of them.

        Unless --wrap, --optimizer or --scaler is given, the same job runs a second time with
        torch's own scaler, for comparison.

        Exit code: 0 if the ranks agree, 3 if they diverged, 2 for an option that cannot be used,
        1 if a rank failed.
        """
        try:
            options = check_options(
                ranks=default_ranks() if ranks is None else ranks,
                wrap=wrap,
                optimizer=optimizer,
                scaler=scaler,
                steps=steps,
                inject=inject,
            )
            check_json(json)
            compare = wrap is None and optimizer is None and scaler is None
            code = play(options, compare=compare, json_path=json)
        except OptionError as error:
            code = _fail(2, str(error))
        except RankError as error:
            code = _fail(1, str(error))
        except KeyboardInterrupt:
            code = _fail(130, "stopped; the ranks have been ended.")
        raise typer.Exit(code)

    return app


def _fail(code: int, text: str) -> int:
    print(f"shardscale demo: {text}", file=sys.stderr)
    return code
