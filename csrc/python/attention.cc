#include "python/context.h"
#include "python/kvcache.h"
#include "python/module.h"
#include "python/program.h"
#include "tilewright/ops.h"

namespace py = pybind11;

namespace tilewright::python {
namespace {

// k may be a layer of a KVCache.
void forward(const View& q, const py::object& k, const View& v, const View& mask,
             const View& kv_lengths, bool causal, float scale, const View& out, const View& lse,
             int64_t left, int64_t right, float softcap, const View& alibi_slopes, double dropout_p,
             uint64_t seed, bool latency) {
  Attention op{q,          {},
               v,          mask,
               kv_lengths, {causal, scale, left, right, softcap, alibi_slopes, dropout_p, seed},
               out,        lse};
  const std::optional<KVSnapshot> cache = load_keys(k.ptr(), op.k);
  op.cache = cache ? &*cache : nullptr;
  op.latency = latency;
  if (cache && recording()) record_cached(k, op);
  const KernelCall context;
  if (cache) return run(op);
  call(op);
}

void backward(const View& q, const View& k, const View& v, const View& mask, const View& kv_lengths,
              bool causal, float scale, const View& out, const View& lse, const View& dout,
              const View& dlse, const View& dq, const View& dk, const View& dv, int64_t left,
              int64_t right, float softcap, const View& alibi_slopes, double dropout_p,
              uint64_t seed, bool latency) {
  call(AttentionBackward{{q,
                          k,
                          v,
                          mask,
                          kv_lengths,
                          {causal, scale, left, right, softcap, alibi_slopes, dropout_p, seed},
                          out,
                          lse,
                          nullptr,
                          latency},
                         dout,
                         dlse,
                         dq,
                         dk,
                         dv});
}

void varlen_forward(const View& q, const View& k, const View& v, const View& cu_seqlens_q,
                    const View& cu_seqlens_k, bool causal, float scale, const View& out,
                    const View& lse, int64_t left, int64_t right, float softcap,
                    const View& alibi_slopes, double dropout_p, uint64_t seed, int64_t max_seqlen_q,
                    int64_t max_seqlen_k) {
  call(AttentionVarlen{q,
                       k,
                       v,
                       cu_seqlens_q,
                       cu_seqlens_k,
                       max_seqlen_q,
                       max_seqlen_k,
                       {causal, scale, left, right, softcap, alibi_slopes, dropout_p, seed},
                       out,
                       lse});
}

void varlen_backward(const View& q, const View& k, const View& v, const View& cu_seqlens_q,
                     const View& cu_seqlens_k, bool causal, float scale, const View& out,
                     const View& lse, const View& dout, const View& dlse, const View& dq,
                     const View& dk, const View& dv, int64_t left, int64_t right, float softcap,
                     const View& alibi_slopes, double dropout_p, uint64_t seed,
                     int64_t max_seqlen_q, int64_t max_seqlen_k) {
  call(
      AttentionVarlenBackward{{q,
                               k,
                               v,
                               cu_seqlens_q,
                               cu_seqlens_k,
                               max_seqlen_q,
                               max_seqlen_k,
                               {causal, scale, left, right, softcap, alibi_slopes, dropout_p, seed},
                               out,
                               lse},
                              dout,
                              dlse,
                              dq,
                              dk,
                              dv});
}

}  // namespace

void register_attention(py::module_& m) {
  m.def("attention_forward", &forward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("mask"),
        py::arg("kv_lengths"), py::arg("causal"), py::arg("scale"), py::arg("out"), py::arg("lse"),
        py::arg("left") = -1, py::arg("right") = -1, py::arg("softcap") = 0.0f,
        py::arg("alibi_slopes") = py::none(), py::arg("dropout_p") = 0.0,
        py::arg("seed") = uint64_t(0), py::arg("latency") = false);
  m.def("attention_backward", &backward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("mask"),
        py::arg("kv_lengths"), py::arg("causal"), py::arg("scale"), py::arg("out"), py::arg("lse"),
        py::arg("dout"), py::arg("dlse"), py::arg("dq"), py::arg("dk"), py::arg("dv"),
        py::arg("left") = -1, py::arg("right") = -1, py::arg("softcap") = 0.0f,
        py::arg("alibi_slopes") = py::none(), py::arg("dropout_p") = 0.0,
        py::arg("seed") = uint64_t(0), py::arg("latency") = false, py::call_guard<KernelCall>());
  m.def("attention_varlen_forward", &varlen_forward, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("causal"), py::arg("scale"),
        py::arg("out"), py::arg("lse"), py::arg("left") = -1, py::arg("right") = -1,
        py::arg("softcap") = 0.0f, py::arg("alibi_slopes") = py::none(), py::arg("dropout_p") = 0.0,
        py::arg("seed") = uint64_t(0), py::arg("max_seqlen_q") = -1, py::arg("max_seqlen_k") = -1,
        py::call_guard<KernelCall>());
  m.def("attention_varlen_backward", &varlen_backward, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("causal"), py::arg("scale"),
        py::arg("out"), py::arg("lse"), py::arg("dout"), py::arg("dlse"), py::arg("dq"),
        py::arg("dk"), py::arg("dv"), py::arg("left") = -1, py::arg("right") = -1,
        py::arg("softcap") = 0.0f, py::arg("alibi_slopes") = py::none(), py::arg("dropout_p") = 0.0,
        py::arg("seed") = uint64_t(0), py::arg("max_seqlen_q") = -1, py::arg("max_seqlen_k") = -1,
        py::call_guard<KernelCall>());
}

}  // namespace tilewright::python
