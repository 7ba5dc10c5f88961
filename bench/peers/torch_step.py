"""Trains an EAGLE-3 draft with PyTorch on request, for `draftsmith bench train`.

Reads one JSON object per line and answers each with one:

    {"shape": {…}, "threads": T, "compile": bool, "lr": x, "device": "cpu" or "cuda"}
                                                             builds model, optimiser and data; answers
                                                             {"version": "…", "device": "…"}
    {"step": true}                                           one optimiser step; answers
                                                             {"step_ns": n, "loss": x, "peak_bytes": n}

One step is what `draftsmith train` does with one pack: projection of the features, `ttt_length` unrolled steps of the
decoder layer with the training-time-test mask (block 0 causal, plus each slot's own later entries), head,
soft cross-entropy against given teacher probabilities weighted by 0.8^k, backward, clipping, AdamW. The teacher's
probabilities are computed once, outside the measured time, as on our side.

Written for speed on a CPU: block 0 goes through the fused attention of PyTorch where the mask allows it (step 0), later
steps add their diagonal logits to a causal product; the softmax of the head is fused by `cross_entropy` with soft
targets; compiled whole where asked for.

On a GPU: matrix products in bf16 by autocast over f32 weights, as on our side; block 0 through flex attention, whose
log-sum-exp merges the diagonals (grouped heads are not repeated); fused AdamW; times by events after a full stop.
"""

import json
import resource
import sys
import time

import torch
import torch.nn.functional as F

try:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
except ImportError:
    create_block_mask = flex_attention = None


def rms_norm(x, w, eps):
    return F.rms_norm(x, (x.shape[-1],), w, eps)


class Draft(torch.nn.Module):
    def __init__(self, s):
        super().__init__()
        self.s = s
        h, hd = s["hidden"], s["head_dim"]
        qw, kvw = s["heads"] * hd, s["kv_heads"] * hd

        def weight(out, inp):
            return torch.nn.Parameter(torch.randn(out, inp) * 0.02)

        def norm():
            return torch.nn.Parameter(torch.ones(h))

        self.fc = weight(h, 3 * h)
        self.q, self.k, self.v = weight(qw, 2 * h), weight(kvw, 2 * h), weight(kvw, 2 * h)
        self.o = weight(h, qw)
        self.gate, self.up = weight(s["intermediate"], h), weight(s["intermediate"], h)
        self.down = weight(h, s["intermediate"])
        self.head = weight(s["draft_vocab"], h)
        self.input_norm, self.hidden_norm, self.post_norm, self.norm = norm(), norm(), norm(), norm()

    def rope(self, x, position):
        # x [heads, T, hd], rotated by halves.
        half = x.shape[-1] // 2
        inverse = self.s["rope_theta"] ** (-torch.arange(half, dtype=torch.float32, device=x.device) / half)
        angle = position[:, None].float() * inverse
        cos, sin = angle.cos(), angle.sin()
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    def merged(self, q, keys, values, mask):
        # Block 0 by flex attention, then the later entries of each slot, by the log-sum-exp of the block.
        scale = self.s["head_dim"] ** -0.5
        out, lse = flex_attention(
            q[None], keys[0][None], values[0][None], block_mask=mask, scale=scale, enable_gqa=True, return_lse=True
        )
        out, lse = out[0], lse[0]
        if len(keys) == 1:
            return out
        group = q.shape[0] // keys[0].shape[0]
        own_k, own_v = (torch.stack(x[1:], 2).repeat_interleave(group, 0) for x in (keys, values))  # [nh, T, D, hd]
        own = (q[:, :, None].float() * own_k.float()).sum(-1) * scale
        total = torch.logaddexp(lse, own.logsumexp(-1))
        mixed = out.float() * (lse - total).exp()[..., None]
        return (mixed + ((own - total[..., None]).exp()[..., None] * own_v.float()).sum(2)).to(q.dtype)

    def forward(self, features, embeds, last, target_head, mask):
        s = self.s
        t, hd, nh, nkv, eps = s["slots"], s["head_dim"], s["heads"], s["kv_heads"], s["eps"]
        group, scale = nh // nkv, s["head_dim"] ** -0.5
        positions = torch.arange(t, device=features.device)
        on_gpu = features.is_cuda
        with torch.no_grad():
            # The target's distribution at the position after each slot; the last slot has none.
            targets = F.linear(last[1:], target_head).softmax(-1)
        hidden = F.linear(features, self.fc)
        keys, values, loss = [], [], 0.0
        for step in range(s["ttt_length"]):
            # Slot `i` of step `k` takes the token of slot `i + k`; what lies beyond the end has no loss.
            e = rms_norm(embeds[step : step + t], self.input_norm, eps)
            u = torch.cat([e, rms_norm(hidden, self.hidden_norm, eps)], -1)
            q = self.rope(F.linear(u, self.q).view(t, nh, hd).transpose(0, 1), positions + step)
            k = self.rope(F.linear(u, self.k).view(t, nkv, hd).transpose(0, 1), positions + step)
            v = F.linear(u, self.v).view(t, nkv, hd).transpose(0, 1)
            if not on_gpu:
                k, v = (x.repeat_interleave(group, 0) for x in (k, v))  # [nh, T, hd]
            keys.append(k)
            values.append(v)
            if on_gpu:
                mixed = self.merged(q, keys, values, mask)
            elif step == 0:
                mixed = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
            else:
                block = torch.baddbmm(mask, q, keys[0].transpose(1, 2), beta=1.0, alpha=scale)
                own = torch.stack([(q * k).sum(-1) for k in keys[1:]], -1) * scale
                p = torch.cat([block, own], -1).softmax(-1)
                mixed = p[..., :t] @ values[0]
                for i, v in enumerate(values[1:]):
                    mixed = mixed + p[..., t + i : t + i + 1] * v
            hidden = hidden + F.linear(mixed.transpose(0, 1).reshape(t, nh * hd), self.o)
            n = rms_norm(hidden, self.post_norm, eps)
            hidden = hidden + F.linear(F.silu(F.linear(n, self.gate)) * F.linear(n, self.up), self.down)
            rows = t - 1 - step
            logits = F.linear(rms_norm(hidden[:rows], self.norm, eps), self.head)
            loss = loss + 0.8**step * F.cross_entropy(logits.float(), targets[step:].float(), reduction="sum") / (t - 1)
        return loss


class Job:
    def __init__(self, request):
        s = request["shape"]
        torch.set_num_threads(request["threads"])
        self.device = request.get("device", "cpu")
        torch.set_default_device(self.device)
        torch.manual_seed(1)
        t, h = s["slots"], s["hidden"]
        self.draft = Draft(s)
        self.optimizer = torch.optim.AdamW(self.draft.parameters(), lr=request["lr"], weight_decay=0.0, fused=True)
        target_head = torch.randn(s["draft_vocab"], h) * 0.1
        if self.device == "cuda":
            mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, t, t, device=self.device)
        else:
            mask = torch.full((t, t), float("-inf")).triu(1)
        features, embeds = torch.randn(t, 3 * h), torch.randn(t + s["ttt_length"], h) * 0.1
        self.data = (features, embeds, torch.randn(t, h), target_head, mask)
        self.loss = torch.compile(self.draft) if request["compile"] else self.draft

    def wait(self):
        if self.device == "cuda":
            torch.cuda.synchronize()

    def step(self):
        self.wait()
        began = time.perf_counter_ns()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss = self.loss(*self.data)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.draft.parameters(), 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.wait()
        return time.perf_counter_ns() - began, loss.item()


job = None
for line in sys.stdin:
    request = json.loads(line)
    if "shape" in request:
        job = Job(request)
        name = torch.cuda.get_device_name() if job.device == "cuda" else "cpu"
        answer = {"version": torch.__version__, "device": name}
    else:
        step_ns, loss = job.step()
        # ru_maxrss counts in KiB on Linux.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if job.device == "cuda":
            peak = torch.cuda.max_memory_reserved()
        answer = {"step_ns": step_ns, "loss": loss, "peak_bytes": peak}
    print(json.dumps(answer), flush=True)
