"""The arms: how a Full layer selects and how every layer attends. All else is the same code on the same weights."""

import importlib
import sys

import torch

import indexcache as ix
from model import PAGE

HALF = "FSFSFSSSSFSFFFFSFFSSFFSFFFSSFFSSFSSSSFSFFFSFSSF"  # The paper's searched patterns for its 30B model.
QUARTER = "FSFSFSSSSFSSSFSSFFSSFSSFSSSSFSSSFSSSSFSSSSSSSSS"


class Shared:
    """Buffers that all arms use in turn."""

    def __init__(self):
        self.held = {}

    def grown(self, name, size, dtype, device):
        """Zeros at first; only ever grows, so that a captured graph finds it where it was."""
        if name not in self.held or self.held[name].numel() < size:
            self.held.pop(name, None)
            self.held[name] = torch.zeros(size, dtype=dtype, device=device)
        return self.held[name]


class Arm:
    """What all arms share: buffers, and the writes of both caches, whose bytes are the same for all kernels."""

    def __init__(self, context, dims, pattern, device, rows, kernels, shared):
        self.context, self.dims, self.device, self.pattern = context, dims, device, pattern
        self.full = [c == "F" for c in pattern]
        self.rows, self.kernels, self.shared = rows, kernels, shared

    def stream(self):
        return torch.cuda.current_stream().cuda_stream if self.device == "cuda" else None

    def write_kv(self, row, batch, pages):
        ix.kv_write(self.context, ix.KvWriteDesc(kv=row, slots=batch.slots, pages=pages), self.stream())

    def write_index(self, q, w, k, batch, pages):
        stream = self.stream()
        ix.index_k_write(self.context, ix.IndexKWriteDesc(k=k, slots=batch.slots, pages=pages), stream)
        codes = torch.empty(q.shape, dtype=torch.uint8, device=q.device)
        desc = ix.IndexQQuantizeDesc(q=q, weights=w, q_out=e4m3(codes), weights_out=w)
        ix.index_q_quantize(self.context, desc, stream)
        return codes, w


def e4m3(codes):
    return ix.as_dtype(codes, "float8_e4m3fn")


class Ours(Arm):
    """`select` and `attend` of the library, straight on the caches' pages."""

    def __init__(self, context, dims, pattern, device, *others):
        super().__init__(context, dims, pattern, device, *others)
        plan = ix.Plan.from_pattern(ix.ModelDesc(layers=dims.layers, topk=dims.topk), pattern)
        self.cache = ix.Cache(context, plan, ix.CacheDesc(max_rows=self.rows))
        self.step = 0

    def begin(self, batch):
        self.step += 1
        self.cache.step_begin(0, len(batch.end), self.step)

    def queries(self, rows):
        return torch.empty(
            rows, self.dims.heads, self.dims.kv_rank + self.dims.rope, dtype=torch.bfloat16, device=self.device
        )

    def space(self, size):
        return self.shared.grown("workspace", max(size, 1), torch.uint8, self.device)

    def select(self, layer, q, w, batch, pages, mark):
        desc = ix.IndexerDesc(q=e4m3(q), weights=w, k=pages, block_table=batch.table, row_end=batch.end)
        space = self.space(self.cache.select_workspace(desc))
        self.cache.select(0, layer, desc, space, self.stream())
        mark("select")

    def attend(self, layer, q, batch, pages, mark):
        out = q.new_empty(len(q), self.dims.heads, self.dims.kv_rank)
        desc = ix.AttentionDesc(q=q, kv=pages, block_table=batch.table, out=out, softmax_scale=self.dims.scale)
        space = self.space(self.cache.attend_workspace(desc))
        self.cache.attend(0, layer, desc, space, self.stream())
        mark("attention")
        return out

    def indices(self, layer, rows):
        out = torch.empty(rows, self.dims.topk, dtype=torch.int32, device=self.device)
        self.cache.export(0, layer, out, self.stream())
        return out


class Public(Arm):
    """DeepGEMM's logits, the fastest exact public top-k, FlashMLA with queries padded to 64 heads."""

    block = 2048  # Rows whose logits are held at once, as servers bound that buffer.
    padded = 64

    def __init__(self, context, dims, pattern, device, *others):
        super().__init__(context, dims, pattern, device, *others)
        self.dg, self.flash = importlib.import_module("deep_gemm"), importlib.import_module("flash_mla")
        for name in ("flashinfer.topk", "vllm._custom_ops"):
            importlib.import_module(name)
        self.decode_topk = "FlashInfer clusters"
        rows, wide = self.rows, dims.kv_rank + dims.rope
        self.kept = self.shared.grown("kept", rows * dims.topk, torch.int32, device).view(rows, dims.topk)
        q = self.shared.grown("padded", rows * self.padded * wide, torch.bfloat16, device)
        self.q = q.view(rows, self.padded, wide)
        self.zeros = torch.zeros(rows, dtype=torch.int32, device=device)
        self.sms = torch.cuda.get_device_properties(0).multi_processor_count

    def begin(self, batch):
        if batch.decode:  # Both once a step for all layers.
            self.lens = batch.end.view(-1, 1)
            self.schedule = self.dg.get_paged_mqa_logits_metadata(self.lens, PAGE, self.sms)
            self.meta, _ = self.flash.get_mla_metadata()

    def queries(self, rows):
        return self.q[:rows]

    def select(self, layer, q, w, batch, pages, mark):
        q = q.view(torch.float8_e4m3fn)
        if batch.decode:
            logits = self.dg.fp8_paged_mqa_logits(
                q.unsqueeze(1), pages.view(-1, PAGE, 1, self.dims.index_dim + 4), w, self.lens, batch.table,
                self.schedule, batch.longest, clean_logits=False,
            )  # fmt: skip
            mark("indexer")
            self.slots = DECODE_TOPK[self.decode_topk](self, logits, batch)
            mark("top-k")
            return
        k, scale = self.kernels.gather_index_k(pages, batch.table[0], batch.longest)
        rows = len(q)
        for r in range(0, rows, self.block):
            s = slice(r, min(r + self.block, rows))
            n = batch.longest - (rows - s.stop)  # What the block's last row sees.
            logits = self.dg.fp8_mqa_logits(
                q[s], (k[:n], scale[:n]), w[s], self.zeros[s], batch.end[s], clean_logits=False
            )
            mark("indexer")
            vllm_per_row(self, logits, batch.end[s], self.kept[s])
            mark("top-k")
            del logits  # Before the next are made: 1.7 GB at 200K.

    def attend(self, layer, q, batch, pages, mark):
        if batch.decode:
            out, _ = self.flash.flash_mla_with_kvcache(
                q.unsqueeze(1), pages.view(-1, PAGE, 1, 656), None, None, self.dims.kv_rank, self.meta,
                softmax_scale=self.dims.scale, is_fp8_kvcache=True, indices=self.slots.unsqueeze(1), use_legacy=True,
            )  # fmt: skip
            out = out.squeeze(1)
        else:
            kv = self.kernels.widen(pages, batch.table[0], batch.longest)
            indices = self.kept[: len(q)].unsqueeze(1)
            out = self.flash.flash_mla_sparse_fwd(
                q, kv.unsqueeze(1), indices, self.dims.scale, use_legacy=True, return_log2_lse=False
            )[0]
        mark("attention")
        return out


# Public top-k kernels. In prefill: indices of `logits` rows below `end` to `out`. In decode: to slots.


def vllm_per_row(arm, logits, end, out):
    torch.ops._C.top_k_per_row_prefill(logits, arm.zeros, end, out, len(out), *logits.stride(), out.shape[1])


def flashinfer(arm, logits, batch):
    topk = sys.modules["flashinfer.topk"]
    return topk.top_k_page_table_transform(logits, batch.tokens, batch.end, arm.dims.topk)


def flashinfer_clusters(arm, logits, batch):
    topk = sys.modules["flashinfer.topk"]
    return topk.topk_clusters_page_table_transform(logits, batch.end, batch.tokens, arm.dims.topk)


def vllm_decode(arm, logits, batch):
    out = torch.empty(len(logits), arm.dims.topk, dtype=torch.int32, device=logits.device)
    vllm_per_row(arm, logits, batch.end, out)
    return arm.kernels.to_slots(out, batch.tokens)


DECODE_TOPK = {"FlashInfer": flashinfer, "FlashInfer clusters": flashinfer_clusters, "vLLM per row": vllm_decode}
