"""Vision transformers by their published sizes: what their block matrices are, and what a training step computes."""

from __future__ import annotations

from dataclasses import dataclass

IMAGE = 224  # pixels a side, in every source below


@dataclass(frozen=True)
class ViT:
    """The block matrices of a vision transformer: qkv, projection and the two of the MLP, per block.

    Args:
        patch: side length in pixels.
        published: parameters of the whole model as its source gives them, heads and embeddings included.
        timm: the name of the same model there.
    """

    width: int
    depth: int
    mlp: int
    source: str
    patch: int = 16
    published: float | None = None
    timm: str | None = None

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(out, in) of one block, q, k and v packed."""
        return [(3 * self.width, self.width), (self.width, self.width), (self.mlp, self.width), (self.width, self.mlp)]

    @property
    def parts(self) -> list[tuple[int, int]]:
        """(out, in) of one block as the penalty counts them: q, k and v are a matrix each."""
        return [(self.width, self.width)] * 3 + self.matrices[1:]

    @property
    def parameters(self) -> int:
        """Of the block matrices."""
        return self.depth * sum(m * n for m, n in self.matrices)

    @property
    def columns(self) -> int:
        """Of all parts together: the length of every z in one buffer."""
        return self.depth * sum(n for _, n in self.parts)

    @property
    def tokens(self) -> int:
        """Patches of an image; a class token, where there is one, adds half a per cent."""
        return (IMAGE // self.patch) ** 2

    @property
    def flops_per_image(self) -> float:
        """Of a training step: 6 for every parameter and token, and 12 T^2 width a block for attention's two products.

        Source: Chowdhery et al., PaLM, arXiv 2204.02311, appendix B.
        """
        return 6.0 * self.parameters * self.tokens + 12.0 * self.depth * self.width * self.tokens**2


DEIT = "Touvron et al., ICML 2021, arXiv 2012.12877, table 1"
VIT = "Dosovitskiy et al., ICLR 2021, arXiv 2010.11929, table 1"
SCALING = "Zhai et al., CVPR 2022, arXiv 2106.04560, table 2"
PALI = "Chen et al., PaLI, ICLR 2023, arXiv 2209.06794"
VIT_22B = "Dehghani et al., ICML 2023, arXiv 2302.05442, table 1"

VITS = {
    "vit-ti": ViT(192, 12, 768, DEIT, 16, 5e6, "vit_tiny_patch16_224"),
    "vit-s": ViT(384, 12, 1536, DEIT, 16, 22e6, "vit_small_patch16_224"),
    "vit-b": ViT(768, 12, 3072, VIT, 16, 86e6, "vit_base_patch16_224"),
    "vit-l": ViT(1024, 24, 4096, VIT, 16, 307e6, "vit_large_patch16_224"),
    "vit-h": ViT(1280, 32, 5120, VIT, 14, 632e6, "vit_huge_patch14_224"),
    "vit-g": ViT(1408, 40, 6144, SCALING, 14, 1011e6, "vit_giant_patch14_224"),
    "vit-G": ViT(1664, 48, 8192, SCALING, 14, 1843e6, "vit_gigantic_patch14_224"),
    # Its count holds an attention pooling head as large as a block.
    "vit-e": ViT(1792, 56, 15360, PALI, 14, 3926e6),
    "vit-22b": ViT(6144, 48, 24576, VIT_22B, 14, 21743e6),
}
LADDER = tuple(name for name in VITS if name != "vit-ti")
