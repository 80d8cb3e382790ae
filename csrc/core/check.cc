#include "core/check.h"

#include "core/overlap.h"

namespace tilewright {

std::string format_shape(const int64_t* shape, int rank) {
  std::string s = "(";
  for (int d = 0; d < rank; ++d) {
    if (d) s += ", ";
    s += std::to_string(shape[d]);
  }
  return s + (rank == 1 ? ",)" : ")");
}

void Check::shape_error(const std::string& message) const {
  throw ShapeError(std::string(op) + ": " + message);
}
void Check::dtype_error(const std::string& message) const {
  throw DtypeError(std::string(op) + ": " + message);
}
void Check::unsupported(const std::string& message) const {
  throw UnsupportedError(std::string(op) + ": " + message);
}

void Check::present(const char* arg, const View& v) const {
  if (!v) dtype_error(std::string(arg) + " is required, got None");
}

void Check::dtype(const char* arg, const View& v, std::initializer_list<DType> allowed) const {
  present(arg, v);
  if (v.device == Device::gpu && !has_cuda) {
    unsupported(std::string("there is no CUDA kernel yet, and ") + arg +
                " is in a GPU's memory; copy it to the CPU");
  }
  std::string names;
  for (const DType& t : allowed) {
    if (v.dtype == t) return;
    if (&t != allowed.begin()) names += &t + 1 == allowed.end() ? " or " : ", ";
    names += dtype_name(t);
  }
  dtype_error(std::string(arg) + " must be " + names + ", got " +
              (v.note ? v.note : dtype_name(v.dtype)));
}

void Check::rank(const char* arg, const View& v, int at_least, const char* meaning) const {
  present(arg, v);
  if (v.rank >= at_least) return;
  shape_error(std::string(arg) + " must have at least " + std::to_string(at_least) + " axes, " +
              meaning + ", got shape " + format_shape(v));
}

void Check::shape(const char* arg, const View& v, const int64_t* want, int rank, const char* why,
                  const View* like) const {
  present(arg, v);
  bool same = v.rank == rank;
  for (int d = 0; same && d < rank; ++d) same = v.shape[d] == want[d];
  if (same) return;
  shape_error(std::string(arg) + " must have shape " + format_shape(want, rank) + " " + why +
              (like ? " " + format_shape(*like) : "") + ", got " + format_shape(v));
}

void Check::shape(const char* arg, const View& v, std::initializer_list<int64_t> want,
                  const char* why, const View* like) const {
  shape(arg, v, want.begin(), int(want.size()), why, like);
}

void Check::same_shape(const char* arg, const View& v, const View& like,
                       const char* like_name) const {
  bool same = v.rank == like.rank;
  for (int d = 0; same && d < v.rank; ++d) same = v.shape[d] == like.shape[d];
  if (same) return;
  shape(arg, v, like.shape, like.rank, (std::string("to match ") + like_name).c_str());
}

void Check::output(const char* arg, const View& v, std::initializer_list<DType> allowed) const {
  dtype(arg, v, allowed);
  if (!v.writable) shape_error(std::string(arg) + " must be writable, got a read-only array");
  if (v.size() == 0) return;  // NumPy gives empty arrays any strides
  for (int d = 0; d < v.rank; ++d) {
    if (v.stride[d] != 0 || v.shape[d] == 1) continue;
    shape_error(std::string(arg) + " must not be a broadcast view (axis " + std::to_string(d) +
                " has stride 0)");
  }
  if (overlaps_itself(v)) {
    shape_error(std::string(arg) + " must have elements of its own, got strides that meet");
  }
}

void Check::no_overlap(const char* arg, const View& out, const char* other, const View& input,
                       bool same_array_allowed) const {
  if (!share_memory(out, input) || (same_array_allowed && same_array(out, input))) return;
  shape_error(std::string(arg) + " must not share memory with " + other +
              (same_array_allowed ? " unless it is exactly the same array" : "") + ", got overlap");
}

}  // namespace tilewright
