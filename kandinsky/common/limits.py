"""Numbers that more than one room goes by: what the code does and what plans and checks count on, each stated once."""

# Pixels, patches and tokens. An image pixel is 8 x 8 to a latent cell and a patch is 2 x 2 cells; NABLA works on blocks
# of 8 x 8 patches of one frame.
PATCH_PIXELS = 16
BLOCK_SIDE = 8  # patches
BLOCK_TOKENS = BLOCK_SIDE**2
NABLA_PIXELS = BLOCK_SIDE * PATCH_PIXELS

# What the published models' rotary tables were built for.
MAX_PATCHES = 128  # an axis
MAX_TEXT_TOKENS = 1024

# Entries of NABLA's maps, over all heads, that are worked on at once: bounds what sorting and counting need besides.
MAP_ENTRIES_AT_ONCE = 2**24

# Places on the device for visual blocks that stream: one is computed with while the other is filled.
STREAM_BUFFERS = 2

# Pinned host memory that copies to a GPU go through, a buffer being filled while others are copied: at 22 GB/s a buffer
# takes 1.5 ms. A power of two, which is what PyTorch rounds to when it pins.
STAGING_BUFFERS = 4
STAGING_BYTES = 2**25

# Tokens at a time, where a visual block runs in parts or memory is short.
CHUNK_TOKENS = 8192

# Of a video VAE's layer, how much is worked on at once, as far as whole frames allow. On a CPU elements of its input,
# by what stays in caches; with fewer than two frames, copying the history costs more than the frame itself.
ELEMENTS_AT_ONCE = 2**21
LEAST_FRAMES_AT_ONCE = 2
# On a GPU bytes: what is smaller than that is launched at once. Of frames that are larger the history of two is a third
# of six, and with six the decoder takes as much memory as on a CPU, whose kernels want copies.
GPU_BYTES_AT_ONCE = 2**26
LEAST_FRAMES_ON_GPU = 6
