"""StableHLO text to a LiteRT file, in a process of its own: python litert_child.py IN OUT.

Before editing: run as a script and import nothing of this package. The converter holds its own copy
of MLIR, and in a process that has loaded jax, with another copy, it crashes.
"""

import pathlib
import sys

from litert_converter.mlir import ir, passmanager
from litert_converter.mlir._mlir_libs import converter_api_ext as converter


def main(source: pathlib.Path, target: pathlib.Path) -> None:
    """Converts the function "main", from "image" to "logits"."""
    context = ir.Context()
    converter.prepare_mlir_context(context)
    with context, ir.Location.unknown():
        module = ir.Module.parse(source.read_text())
        converter.set_signature(
            module.operation,
            signature_name="serving_default",
            input_names=["image"],
            output_names=["logits"],
        )
        config = converter.ConvertToTFLConfig()
        config.model_origin_framework = "JAX"
        converter.run_convert_to_tfl_passes(module, passmanager.PassManager(), config)
        converter.export_flatbuffer_to_file(module.operation, str(target))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
