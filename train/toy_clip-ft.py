"""CLIP-FT on toyworld: the control of `toy_cliptex`, on with the contrastive loss alone.

    clipbench train toy_clip-ft --data data/toyworld-labelled --register toy-clip-ft

Goes on from `toy_clip` (--start for another model) with the very data, steps, order, captions and crops of
`toy_cliptex`, which differs in `data.labels` and in nothing else.
Time and score of this very recipe: not measured; `make effect` measures smaller ones.
Scores on toyworld say nothing about real images. Every number is our own choice.
"""

# --- knobs ------------------------------------------------------------------------------------------------------------
steps = 500
batch_size = 64  # over all processes

# --- what is trained --------------------------------------------------------------------------------------------------
model = dict(source="openclip:local-dir:runs/train/toy_clip/export")
data = dict(captions=dict(alt=1.0), workers=2)  # --data names the shards
resolution = dict(size=128)

# --- how --------------------------------------------------------------------------------------------------------------
optimizer = dict(lr=3e-4, min_lr=1e-6, warmup_steps=steps // 10, head_lr_factor=3.0, weight_decay=0.1, clip_grad=1.0)

# --- what never changes a weight --------------------------------------------------------------------------------------
checkpoint_interval = 200
log_interval = 20
