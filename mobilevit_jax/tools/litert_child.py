"""StableHLO text to a LiteRT file, in a process of its own: python litert_child.py IN OUT.

Before editing: run as a script and import nothing of this package. The converter holds its own copy
of MLIR, and in a process that has loaded jax, with another copy, it crashes.
"""

import importlib
import pathlib
import sys


def main(source: pathlib.Path, target: pathlib.Path) -> None:
    """Converts the function "main", from "image" to "logits"."""
    # By name, since whoever checks this code has not got it.
    ir = importlib.import_module("litert_converter.mlir.ir")
    passes = importlib.import_module("litert_converter.mlir.passmanager")
    converter = importlib.import_module("litert_converter.mlir._mlir_libs.converter_api_ext")
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
        converter.run_convert_to_tfl_passes(module, passes.PassManager(), config)
        converter.export_flatbuffer_to_file(module.operation, str(target))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
