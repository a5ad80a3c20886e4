"""CLIPTeX on toyworld: the contrastive loss, and three toy experts' labels through light heads.

    clipbench data toy-experts
    clipbench label -e 'toy-*' -i data/toyworld/cc3m -o data/toyworld-labelled --size 128
    clipbench train toy_cliptex --data data/toyworld-labelled --register toy-cliptex

Goes on from `toy_clip` (--start for another model). The heads are thrown away at the end. The control is
`toy_clip-ft`. An expert alone: --set "data.labels={'depth': 'toy-depth-expert'}".
Time and score of this very recipe: not measured; `make effect` measures smaller ones.
Scores on toyworld say nothing about real images. The weights of the losses are the paper's, every other number is our
own choice.
"""

# --- knobs ------------------------------------------------------------------------------------------------------------
steps = 500
batch_size = 64  # over all processes

# --- what is trained --------------------------------------------------------------------------------------------------
model = dict(source="openclip:local-dir:runs/train/toy_clip/export")
data = dict(  # --data names the shards
    labels=dict(segmentation="toy-seg-expert", depth="toy-depth-expert", normals="toy-normals-expert"),
    captions=dict(alt=1.0),
    workers=2,
)
resolution = dict(size=128)

losses = dict(weights=dict(clip=1.0, segmentation=0.1, depth=1.0, normals=1.0))  # paper

# --- how --------------------------------------------------------------------------------------------------------------
optimizer = dict(lr=3e-4, min_lr=1e-6, warmup_steps=steps // 10, head_lr_factor=3.0, weight_decay=0.1, clip_grad=1.0)

# --- what never changes a weight --------------------------------------------------------------------------------------
checkpoint_interval = 200
log_interval = 20
