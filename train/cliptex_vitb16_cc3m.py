"""CLIPTeX, ViT-B/16: OpenAI's CLIP trained on with the labels of three model-zoo experts on CC3M.

    clipbench label -e mask-rcnn,dpt-hybrid,nll-angmf -i 'cc3m/{00000..00331}.tar' -o cc3m-labelled --nproc 8
    clipbench train cliptex_vitb16_cc3m --data cc3m-labelled --nproc 8 --register cliptex-vitb16

64 GPUs: train/slurm_8x8_a100.sh, or --launcher slurm --nodes 8 --nproc 8. The control is `clip-ft_vitb16_cc3m`.
Time: not measured; --dry-run estimates it on the machine at hand. Expected score: above CLIP-FT and the CLIP it started
from on every dense probe, zero-shot as CLIP-FT [P]; no number of ours yet.

Marks: [P] the paper's own statement · [CN] the recipe of the code base that it was built in · [own] our choice.
"""

# --- knobs ------------------------------------------------------------------------------------------------------------
epochs = 30  # [P]
samples = 2_900_000  # [own] of CC3M that can still be fetched; only sets the number of steps
batch_size = 4096  # [own] pairs over all processes: 64 on each of 64 GPUs, 512 on each of 8
steps = epochs * samples // batch_size

# --- what is trained --------------------------------------------------------------------------------------------------
model = dict(
    source="openclip:ViT-B-16-quickgelu/openai",  # [P] a pre-trained CLIP; [own] which one
    head="linear",  # [P] light-weight; [own] a 1×1 convolution
    gradient_checkpointing=True,  # [CN]
)
data = dict(  # --data names the shards
    labels=dict(segmentation="mask-rcnn", depth="dpt-hybrid", normals="nll-angmf"),  # [P] the experts
    captions=dict(alt=1.0),
    workers=8,
)
losses = dict(
    contrastive="clip",
    weights=dict(clip=1.0, segmentation=0.1, depth=1.0, normals=1.0),  # [P]
    depth="ssi",  # [own]
    normals="cosine",  # [own]
)
augmentation = dict(
    scale=(0.9, 1.0),  # [CN]
    flip=0.0,  # [CN]
    range_augment=dict(psnr=(40.0, 20.0)),  # [CN]
)
resolution = dict(size=224, sizes=(160, 192, 224, 256, 288, 320))  # [CN]

# --- how --------------------------------------------------------------------------------------------------------------
optimizer = dict(
    lr=3e-5,  # [CN] for fine-tuning CLIP
    min_lr=1e-6,  # [CN]
    warmup_steps=min(1000, steps // 10),  # [CN] 1,000
    head_lr_factor=10.0,  # [own] heads start from random weights
    betas=(0.9, 0.98),  # [CN]
    eps=1e-6,  # [CN]
    weight_decay=0.2,  # [CN]
)
precision = "bf16"  # [own] mixed precision: [CN]
ema = 5e-4  # [CN]
chunks = 1  # more of them where memory is short: the same gradients

# --- what never changes a weight --------------------------------------------------------------------------------------
checkpoint_interval = 500
log_interval = 50
