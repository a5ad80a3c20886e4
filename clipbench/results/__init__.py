"""Results: what a run writes down, and how rows are compared.

- `Record`, `write_record`, `load_records`: one JSON file a (backbone, task, head).
- `record_fingerprint`, `protocol_id`: hashes of exactly what changes a score, known before a run starts.
- `PerImageWriter`, `load_per_image`: per-image statistics, from which the score can be recomputed.
- `build_leaderboard`, `write_leaderboard`: the table; a row with another protocol is never mixed in.
- `diff_records`, `paired_bootstrap`: two rows side by side.

The folder: `records/<task>/<stem>.json`, `per_image/<task>/<stem>.npz`, `leaderboard.md`, `leaderboard.csv`, and
`runs/` with what a run needs to resume.
"""

from clipbench.results.compare import (
    ABSENT,
    Bootstrap,
    Difference,
    bootstrap_records,
    brief,
    diff_records,
    diff_settings,
    paired_bootstrap,
)
from clipbench.results.hashing import PROTOCOL_VERSION, canonical, fingerprint, protocol_id, record_fingerprint
from clipbench.results.leaderboard import (
    Cell,
    Column,
    Leaderboard,
    Table,
    build_leaderboard,
    to_csv,
    to_dict,
    to_markdown,
    write_leaderboard,
)
from clipbench.results.machine import Environment, Memory, device_name, environment, peak_memory, versions
from clipbench.results.per_image import (
    SEGMENTATION,
    PerImage,
    PerImageWriter,
    load_per_image,
    merge_parts,
    segmentation_rows,
)
from clipbench.results.recompute import Summable, miou_from_per_image, no_interval, summable
from clipbench.results.record import (
    BackboneInfo,
    DatasetInfo,
    FeatureMap,
    FileFit,
    Record,
    Score,
    Selection,
    Timings,
    Trial,
    Weights,
    load_records,
    read_record,
    record_path,
    record_stem,
    slug,
    write_record,
)

__all__ = [
    "ABSENT",
    "PROTOCOL_VERSION",
    "SEGMENTATION",
    "BackboneInfo",
    "Bootstrap",
    "Cell",
    "Column",
    "DatasetInfo",
    "Difference",
    "Environment",
    "FeatureMap",
    "FileFit",
    "Leaderboard",
    "Memory",
    "PerImage",
    "PerImageWriter",
    "Record",
    "Score",
    "Selection",
    "Summable",
    "Table",
    "Timings",
    "Trial",
    "Weights",
    "bootstrap_records",
    "brief",
    "build_leaderboard",
    "canonical",
    "device_name",
    "diff_records",
    "diff_settings",
    "environment",
    "fingerprint",
    "load_per_image",
    "load_records",
    "merge_parts",
    "miou_from_per_image",
    "no_interval",
    "paired_bootstrap",
    "peak_memory",
    "protocol_id",
    "read_record",
    "record_fingerprint",
    "record_path",
    "record_stem",
    "segmentation_rows",
    "slug",
    "summable",
    "to_csv",
    "to_dict",
    "to_markdown",
    "versions",
    "write_leaderboard",
    "write_record",
]
