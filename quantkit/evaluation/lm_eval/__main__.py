"""lm-eval's own command line with the model type ``quantkit`` and the offline tasks.

    python -m quantkit.evaluation.lm_eval --model quantkit --model_args path=MODEL.gguf --tasks arc_easy_local

Releases of lm-eval after 0.4.13 find the type by quantkit's entry point; ``lm_eval`` itself knows it then.
"""

from __future__ import annotations

import sys

from quantkit.errors import QuantkitError
from quantkit.evaluation.lm_eval.documents import TASKS
from quantkit.evaluation.lm_eval.tasks import require_lm_eval

TYPE = "quantkit"
CLASS = "quantkit.evaluation.lm_eval.plugin_model:QuantkitLM"


def register() -> None:
    """Make the type known to lm-eval in this process; it is imported when a model is asked for.

    Raises MissingDependencyError without lm-eval.
    """
    require_lm_eval()
    import lm_eval.models  # noqa: F401 (fills the registry)
    from lm_eval.api.registry import model_registry

    if TYPE not in model_registry:
        model_registry.register(TYPE, target=CLASS)


def main() -> None:
    """lm-eval's command line; a mistake that quantkit finds is one line and exit code 1."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        if "--include_path" not in sys.argv and len(sys.argv) > 2:
            sys.argv += ["--include_path", str(TASKS)]
        cli_evaluate()
    except QuantkitError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
