"""Zero-shot classification on a data set of clip-benchmark, with its class names and templates.

    clipbench probe --backbone clip-vitb16 --task cb-vtab-flowers --data-root DIR
    clipbench probe --backbone clip-vitb16 --task cb-imagenetv2,cb-cars --data-root DIR

DIR holds each set in a folder of its name (`DIR/vtab-flowers`, or `DIR/wds_vtab-flowers` as the Hub's exports are
called), or is that folder. A set's webdataset export is read as it is; for other forms clip-benchmark's own loader is
used, which must be installed: pip install 'clipbench[clip-benchmark]'. Nothing is downloaded.

Of the 38 sets of open_clip's results table, 31 are here (`clipbench.data.clip_benchmark.SUITE`), two are
flickr30k-retrieval and coco-retrieval, and five have metrics of their own that are not offered. The table's metric is
top-1, but mean per-class recall for caltech101, fgvc_aircraft, flowers and pets; both are reported.
"""

family = "zeroshot"
dataset = "clip-benchmark"  # registry.yaml: where the data lie and where to get them

dataset_name = "imagenet1k"  # clip-benchmark's name; set by the task's: cb-vtab-flowers is "vtab/flowers"

# --- text -------------------------------------------------------------------------------------------------------------
classes = "clip-benchmark"  # its own; or a list or file of yours, as in imagenet_zeroshot.py
templates = "clip-benchmark"

# --- the head ---------------------------------------------------------------------------------------------------------
heads = dict(zeroshot=dict())  # cosine similarity in the joint space; the logit scale changes no rank

# --- data -------------------------------------------------------------------------------------------------------------
# Images go through the model's own preprocessing: its size, resizing, crop and filter.
val_data = dict(type="clip-benchmark", name=dataset_name, split="test")

# --- evaluation -------------------------------------------------------------------------------------------------------
evaluation = None  # nothing to choose

# --- what never changes a score ---------------------------------------------------------------------------------------
runtime = dict(workers=4, eval_batch=128)
