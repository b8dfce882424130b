"""`pellucid.evaluate.quantise` under the name that programs written for earlier versions import."""

from pellucid.evaluate.quantise import (
    Cost,
    Format,
    Quantisation,
    quantisation_cost,
    quantise,
    quantise_checkpoint,
)

__all__ = ["Cost", "Format", "Quantisation", "quantisation_cost", "quantise", "quantise_checkpoint"]
