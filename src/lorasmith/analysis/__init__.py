"""Adapter algebra on plain tensors: spectrum, truncation, combination, overlap, extraction, survival.

Pure functions. Through QR of the (stacked) factors in float64 wherever the result is low-rank, so
delta is never formed unless a docstring says so.

May import: lora, quantised, errors.
"""

from lorasmith.analysis.advice import (
    Capacity,
    Dimension,
    RateRange,
    Truncation,
    capacity,
    intrinsic_dimension,
    rate_range,
    truncation_curve,
)
from lorasmith.analysis.amplification import Amplification, amplification
from lorasmith.analysis.combine import Combined, Method, combine, subtract
from lorasmith.analysis.compare import Comparison, compare, cosine, overlap_grid, subspace_overlap
from lorasmith.analysis.dora import Converted, dora_to_lora
from lorasmith.analysis.extract import Extracted, ExtractErrors, extract_from_full, looks_linear
from lorasmith.analysis.projection import Projection
from lorasmith.analysis.spectrum import Spectrum, singular_values, spectra, spectrum, svd
from lorasmith.analysis.storage import Storage, StorageName, as_stored
from lorasmith.analysis.survival import Survival, SurvivalReport, survival, survival_report
from lorasmith.analysis.tensors import open_tensors
from lorasmith.analysis.truncate import RelativeError, relative_error, truncate

__all__ = [
    "Amplification",
    "Capacity",
    "Combined",
    "Comparison",
    "Converted",
    "Dimension",
    "ExtractErrors",
    "Extracted",
    "Method",
    "Projection",
    "RateRange",
    "RelativeError",
    "Spectrum",
    "Storage",
    "StorageName",
    "Survival",
    "SurvivalReport",
    "Truncation",
    "amplification",
    "as_stored",
    "capacity",
    "combine",
    "compare",
    "cosine",
    "dora_to_lora",
    "extract_from_full",
    "intrinsic_dimension",
    "looks_linear",
    "open_tensors",
    "overlap_grid",
    "rate_range",
    "relative_error",
    "singular_values",
    "spectra",
    "spectrum",
    "subspace_overlap",
    "subtract",
    "survival",
    "survival_report",
    "svd",
    "truncate",
    "truncation_curve",
]
