// conv2d, its input gradient (which is conv_transpose2d) and its weight gradient as products of gathered operands
// (gather.cuh): no column matrix is ever stored. bfloat16 and float16 on the tensor cores, float32 by exact products on
// the ordinary ones, or there too, as TF32. One kernel serves all three passes; a pass is a plan of steps.
//   forward          rows: output pixels,           columns: output channels,     k: taps x input channels
//   input gradient   rows: input pixels of a class, columns: input channels,      k: taps of that class x output channels
//   weight gradient  rows: output channels,         columns: taps x channels,     k: output pixels, cut into parts
// With stride s, input rows of one residue modulo s see only every s-th filter row: each class of residues is a dense
// product of its own, and no zeros are multiplied. Every sum has a fixed order: no atomics.
// Floor: 2 N P Q K R S C / groups operations at the cores' rate, or the tensors once over the memory's bandwidth.
#include "conv.h"

#include <numeric>

#include "activation.cuh"
#include "conv_depthwise.h"
#include "ffma_tile.cuh"
#include "gather.cuh"
#include "hopper.cuh"
#include "tile_store.cuh"

namespace dlkern::cuda {
namespace {

// ---- The product ----

struct Side {
  const void* data;
  Steps outer, k;
  int64_t group;  // from one group's elements to the next one's
  int height, width;
  bool outer_fastest;
};

// What differs between the classes of an input gradient. Other passes have one.
struct Class {
  int64_t m, k;  // sizes
  uint32_t row_middle, row_last;  // digits of a row
  FastDivide k_middle;
  Spot a_origin, b_origin;
  int64_t result_origin;
};
constexpr int kClasses = 16;  // of a launch

struct Product {
  Side a, b;
  FastDivide k_last;
  int64_t n;  // columns of a group
  uint32_t column_middle, column_last;
  uint32_t column_tiles, groups;
  Steps row, column;  // of the result
  int64_t result_group, bias_group;
  void* result;
  const void *bias, *residual;
  int activation;
  int64_t part_length, part_stride;  // of k, and of the float results of parts; part_length 0: not cut
  Class classes[kClasses];
};

template <class T, class SHAPE, Stored A_STORED, Stored B_STORED, int WIDTH>
struct TensorCores {
  using Element = T;
  using Shape = SHAPE;
  template <int OUTER, Stored STORED>
  using Operand =
      Gathered<Staged<T, OUTER, STORED>, T, OUTER, kBlockK<T>, STORED == Stored::k_last, WIDTH, SHAPE::kThreads>;
  using A = Operand<SHAPE::kBlockM, A_STORED>;
  using B = Operand<SHAPE::kBlockN, B_STORED>;
  using Sum = Accumulator<SHAPE>;
  static constexpr int kSharedBytes = mma_shared_bytes<SHAPE, A, B>();

  static DLKERN_DEVICE void run(Sum& sum, const A& a, const B& b, void* shared) {
    mma_tile<SHAPE>(sum, a, b, 0, 0, static_cast<T*>(shared), [](const T*) {});
  }
};

template <class SHAPE>
struct Exact {
  using Element = float;
  using Shape = SHAPE;
  template <int OUTER>
  using Operand = Gathered<FfmaStaged<OUTER, SHAPE::kBlockK>, float, OUTER, SHAPE::kBlockK, false, 1, SHAPE::kThreads>;
  using A = Operand<SHAPE::kBlockM>;
  using B = Operand<SHAPE::kBlockN>;
  using Sum = FfmaAccumulator<SHAPE>;
  static constexpr int kSharedBytes = ffma_shared_bytes<SHAPE, A, B>();

  static DLKERN_DEVICE void run(Sum& sum, const A& a, const B& b, void* shared) {
    ffma_tile<SHAPE>(sum, a, b, static_cast<float*>(shared));
  }
};

// One block: kBlockM rows x kBlockN columns of one group; blockIdx.z is the class, or the part of k.
template <class ENGINE>
__global__ void __launch_bounds__(ENGINE::Shape::kThreads, ENGINE::Shape::kBlocks)
    conv2d_product_kernel(const __grid_constant__ Product args) {
  using T = typename ENGINE::Element;
  using Shape = typename ENGINE::Shape;
  constexpr int kM = Shape::kBlockM, kN = Shape::kBlockN, kThreads = Shape::kThreads;
  DLKERN_DYNAMIC_SHARED(shared);
  DLKERN_SHARED(Spot, a_spots, [kM]);
  DLKERN_SHARED(Spot, b_spots, [kN]);
  const bool cut = args.part_length != 0;
  const Class& c = args.classes[cut ? 0 : blockIdx.z];
  const uint32_t tiles_a_row = args.column_tiles * args.groups;
  const int64_t m_start = static_cast<int64_t>(blockIdx.x / tiles_a_row) * kM;
  const int64_t group = blockIdx.x % tiles_a_row / args.column_tiles;
  const int64_t n_start = static_cast<int64_t>(blockIdx.x % args.column_tiles) * kN;
  if (m_start >= c.m) return;
  fill_spots<kM, kThreads>(a_spots, args.a.outer, c.a_origin, m_start, c.m, c.row_middle, c.row_last);
  fill_spots<kN, kThreads>(b_spots, args.b.outer, c.b_origin, n_start, args.n, args.column_middle, args.column_last);
  __syncthreads();

  // A part begins in image `image`, so that k's digits stay below 2**31.
  const int64_t k_first = cut ? blockIdx.z * args.part_length : 0;
  const int64_t an_image = static_cast<int64_t>(c.k_middle.divisor) * args.k_last.divisor, image = k_first / an_image;
  const uint32_t k_start = static_cast<uint32_t>(k_first - image * an_image);
  const uint32_t k = static_cast<uint32_t>(cut && c.k - k_first > args.part_length ? args.part_length : c.k - k_first);
  const auto data = [&](const Side& side) {
    return static_cast<const T*>(side.data) + group * side.group + image * side.k.first;
  };
  const Digits digits{c.k_middle, args.k_last};
  const typename ENGINE::A a(data(args.a), a_spots, args.a.k, digits, k_start, k, args.a.height, args.a.width,
                             args.a.outer_fastest);
  const typename ENGINE::B b(data(args.b), b_spots, args.b.k, digits, k_start, k, args.b.height, args.b.width,
                             args.b.outer_fastest);
  typename ENGINE::Sum sum;
  ENGINE::run(sum, a, b, shared);

  __syncthreads();  // the spots serve the result from here on
  fill_spots<kM, kThreads>(a_spots, args.row, Spot{c.result_origin, 0, 0}, m_start, c.m, c.row_middle, c.row_last);
  fill_spots<kN, kThreads>(b_spots, args.column, Spot{0, 0, 0}, n_start, args.n, args.column_middle, args.column_last);
  __syncthreads();
  const T* bias = static_cast<const T*>(args.bias);
  if (bias) bias += group * args.bias_group + n_start;
  const T* residual = static_cast<const T*>(args.residual);
  sum.for_each_pair([&](int row, int column, float first, float second) {
    const Spot of_row = a_spots[row], of_first = b_spots[column], of_second = b_spots[column + 1];
    if (of_row.h < 0 || of_first.h < 0) return;
    const bool has_second = of_second.h >= 0;
    const int64_t at = group * args.result_group + of_row.offset;
    const int64_t first_at = at + of_first.offset, second_at = at + of_second.offset;
    if (cut) {
      float* part = static_cast<float*>(args.result) + blockIdx.z * args.part_stride;
      return store_columns(part, first_at, second_at, has_second, first, second);
    }
    if (bias) {
      first += to_float(bias[column]);
      if (has_second) second += to_float(bias[column + 1]);
    }
    if (residual) {
      first += to_float(residual[first_at]);
      if (has_second) second += to_float(residual[second_at]);
    }
    store_columns(static_cast<T*>(args.result), first_at, second_at, has_second, activated(first, args.activation),
                  activated(second, args.activation));
  });
}

// ---- Which kernel ----

using LargeMma = MmaShape<128, 128, 2, 4, 3>;
using SmallMma = MmaShape<64, 64, 2, 2, 3>;
using LargeFfma = FfmaShape<128, 64, 3, 2>;
using SmallFfma = FfmaShape<64, 64, 3, 4>;

template <class ENGINE>
void launch_product(Product& product, int64_t most_rows, int64_t layers, void* stream) {
  using Shape = typename ENGINE::Shape;
  // An A100's multiprocessor holds the blocks that the registers leave room for, 1 KB a block its own.
  static_assert(Shape::kBlocks * (ENGINE::kSharedBytes + 1024 + 16 * (Shape::kBlockM + Shape::kBlockN)) <= 164 * 1024);
  product.column_tiles = static_cast<uint32_t>(ceil_div(product.n, Shape::kBlockN));
  const int64_t blocks = ceil_div(most_rows, Shape::kBlockM) * product.column_tiles * product.groups;
  launch("conv2d_product_kernel", conv2d_product_kernel<ENGINE>, grid_of(blocks, 1, layers), dim3(Shape::kThreads),
         ENGINE::kSharedBytes, stream, false, product);
}

// Tiles of a result, and whether large ones fill half the multiprocessors of an A100 or H200. Looks at sizes alone.
int64_t tiles(int64_t rows, int64_t columns, int64_t groups, int size) {
  return ceil_div(rows, size) * ceil_div(columns, size) * groups;
}
bool enough_for_large(int64_t rows, int64_t columns, int64_t groups, int64_t layers) {
  return rows >= 96 && columns >= 96 && tiles(rows, columns, groups, 128) * layers >= 64;
}

template <class T, Stored A_STORED, Stored B_STORED>
void launch_tensor_cores(bool vectors, bool large, Product& product, int64_t most_rows, int64_t layers, void* stream) {
  constexpr int kWidth = 16 / sizeof(T);
  if (vectors && large)
    return launch_product<TensorCores<T, LargeMma, A_STORED, B_STORED, kWidth>>(product, most_rows, layers, stream);
  if (vectors)
    return launch_product<TensorCores<T, SmallMma, A_STORED, B_STORED, kWidth>>(product, most_rows, layers, stream);
  // One by one: 4 bytes asynchronously, 2 through registers, of which large tiles have none to spare.
  constexpr auto kStored = sizeof(T) == 4 ? Stored::k_first : Stored::k_last;
  if constexpr (sizeof(T) == 4) {
    if (large) return launch_product<TensorCores<T, LargeMma, kStored, kStored, 1>>(product, most_rows, layers, stream);
  }
  launch_product<TensorCores<T, SmallMma, kStored, kStored, 1>>(product, most_rows, layers, stream);
}

template <Stored A_STORED, Stored B_STORED>
void launch_on(Element element, bool vectors, Product& product, int64_t most_rows, int64_t layers, void* stream) {
  const bool large = enough_for_large(most_rows, product.n, product.groups, layers);
  if (element == Element::float32) {
    if (large)
      launch_product<Exact<LargeFfma>>(product, most_rows, layers, stream);
    else
      launch_product<Exact<SmallFfma>>(product, most_rows, layers, stream);
  } else {
    with_type(element, [&](auto* type) {
      launch_tensor_cores<std::remove_pointer_t<decltype(type)>, A_STORED, B_STORED>(vectors, large, product, most_rows,
                                                                                     layers, stream);
    });
  }
}

// Elements in 16 bytes.
int width_of(Element element) { return is_16_bit(element) ? 8 : 4; }

bool has_vectors(Element element, const ConvTensor& x) {
  const int width = width_of(element);
  return x.c == 1 && x.n % width == 0 && x.h % width == 0 && x.w % width == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

// ---- Plans ----

// A filter tap (r, s) and channel as seen by the input.
Steps tap_steps(const ConvGeometry& g, const ConvTensor& x) {
  return {g.dilation_h * x.h, g.dilation_w * x.w, x.c, g.dilation_h, 0, g.dilation_w, 0};
}
// An output pixel (n, p, q) as seen by the input, and that of pixel (0, 0, 0).
Steps pixel_steps(const ConvGeometry& g, const ConvTensor& x) {
  return {x.n, g.stride_h * x.h, g.stride_w * x.w, 0, g.stride_h, 0, g.stride_w};
}
Spot first_pixel(const ConvGeometry& g, const ConvTensor& x) {
  return {-g.pad_h * x.h - g.pad_w * x.w, -g.pad_h, -g.pad_w};
}
template <class TENSOR>
Steps image_steps(const TENSOR& x) {
  return {x.n, x.h, x.w};
}
Steps last_step(int64_t step) { return {0, 0, step}; }

}  // namespace

bool conv2d_takes_vectors(Element element, const ConvGeometry& g) {
  const int width = width_of(element);
  return element != Element::float32 && g.c / g.groups % width == 0 && g.k / g.groups % width == 0;
}

void conv2d_forward(Element element, const ConvGeometry& g, const ConvTensor& x, const ConvTensor& w, const void* bias,
                    const void* residual, int activation, const ConvResult& y, void* stream) {
  if (g.depthwise()) return depthwise_forward(element, g, x, w, bias, residual, activation, y, stream);
  if (conv2d_forward_sm90(element, g, x, w, bias, residual, activation, y, stream)) return;
  const int64_t channels = g.c / g.groups, filters = g.k / g.groups;
  Product product{};
  product.a = {x.data, pixel_steps(g, x), tap_steps(g, x), channels * x.c, g.h, g.w, x.c != 1};
  product.b = {w.data, last_step(w.n), {w.h, w.w, w.c}, filters * w.n, 1, 1, false};
  product.k_last = FastDivide(channels ? channels : 1);  // none in a matrix product over nothing
  product.n = filters;
  product.column_middle = 1, product.column_last = static_cast<uint32_t>(filters);
  product.groups = static_cast<uint32_t>(g.groups);
  product.row = image_steps(y), product.column = last_step(y.c);
  product.result_group = filters * y.c, product.bias_group = filters;
  product.result = y.data, product.bias = bias, product.residual = residual, product.activation = activation;
  Class& c = product.classes[0];
  c.m = g.n * g.p * g.q, c.k = g.r * g.s * channels;
  c.row_middle = static_cast<uint32_t>(g.p), c.row_last = static_cast<uint32_t>(g.q);
  c.k_middle = FastDivide(g.s);
  c.a_origin = first_pixel(g, x);
  const bool vectors = conv2d_takes_vectors(element, g) && has_vectors(element, x) && has_vectors(element, w);
  launch_on<Stored::k_last, Stored::k_last>(element, vectors, product, c.m, 1, stream);
}

// ---- Input gradient ----

namespace {

// Of one axis: input positions residue, residue + stride, ... and the filter taps that meet an output position there:
// the first and every step-th after it, whose output position is `down` less than the one before's.
struct Residue {
  int positions, first_tap, taps, step, down, output;  // output: where the first tap's is, at the first position

  Residue(int residue, int size, int filter, int stride, int pad, int dilation) {
    const int divisor = std::gcd(stride, dilation);
    positions = static_cast<int>(ceil_div(size - residue, stride));
    step = stride / divisor, down = dilation / divisor;
    first_tap = 0, taps = 0, output = 0;
    for (int tap = 0; tap < step && tap < filter; tap++) {
      const int64_t reach = int64_t{residue} + pad - int64_t{tap} * dilation;
      if (reach % stride != 0) continue;
      first_tap = tap, taps = static_cast<int>(ceil_div(filter - tap, step)), output = static_cast<int>(reach / stride);
      return;
    }
  }
};

}  // namespace

void conv2d_backward_input(Element element, const ConvGeometry& g, const ConvTensor& dy, const ConvTensor& w,
                           const void* bias, const ConvResult& dx, void* stream) {
  if (g.depthwise()) return depthwise_backward_input(element, g, dy, w, bias, dx, stream);
  if (conv2d_backward_input_sm90(element, g, dy, w, bias, dx, stream)) return;
  const int64_t channels = g.c / g.groups, filters = g.k / g.groups;
  Product product{};
  product.a = {dy.data, image_steps(dy), {}, filters * dy.c, g.p, g.q, dy.c != 1};
  product.a.outer.h_middle = product.a.outer.w_last = 1;
  product.b = {w.data, last_step(w.c), {}, filters * w.n, 1, 1, true};
  product.k_last = FastDivide(filters ? filters : 1);
  product.n = channels;
  product.column_middle = 1, product.column_last = static_cast<uint32_t>(channels);
  product.groups = static_cast<uint32_t>(g.groups);
  product.row = {dx.n, g.stride_h * dx.h, g.stride_w * dx.w}, product.column = last_step(dx.c);
  product.result_group = channels * dx.c, product.bias_group = channels;
  product.result = dx.data, product.bias = bias;
  const bool vectors = conv2d_takes_vectors(element, g) && has_vectors(element, dy) && has_vectors(element, w);
  int count = 0;
  int64_t most_rows = 0;
  const auto launch_classes = [&] {
    if (count) launch_on<Stored::k_last, Stored::k_first>(element, vectors, product, most_rows, count, stream);
    count = 0, most_rows = 0;
  };
  for (int residue_h = 0; residue_h < g.stride_h && residue_h < g.h; residue_h++) {
    for (int residue_w = 0; residue_w < g.stride_w && residue_w < g.w; residue_w++) {
      const Residue rows(residue_h, g.h, g.r, g.stride_h, g.pad_h, g.dilation_h);
      const Residue columns(residue_w, g.w, g.s, g.stride_w, g.pad_w, g.dilation_w);
      product.a.k = {-rows.down * dy.h, -columns.down * dy.w, dy.c, -rows.down, 0, -columns.down, 0};
      product.b.k = {rows.step * w.h, columns.step * w.w, w.n};
      Class& c = product.classes[count++];
      c.m = g.n * rows.positions * columns.positions;
      c.k = int64_t{rows.taps} * columns.taps * filters;
      c.row_middle = static_cast<uint32_t>(rows.positions), c.row_last = static_cast<uint32_t>(columns.positions);
      c.k_middle = FastDivide(columns.taps ? columns.taps : 1);
      c.a_origin = {rows.output * dy.h + columns.output * dy.w, rows.output, columns.output};
      c.b_origin = {rows.first_tap * w.h + columns.first_tap * w.w, 0, 0};
      c.result_origin = residue_h * dx.h + residue_w * dx.w;
      most_rows = c.m > most_rows ? c.m : most_rows;
      if (count == kClasses) launch_classes();
    }
  }
  launch_classes();
}

// ---- Weight gradient ----

namespace {

constexpr int64_t kWantedBlocks = 256;  // two a multiprocessor
constexpr int64_t kLeastOfAPart = 512, kMostOfAPart = int64_t{1} << 29;  // pixels
constexpr int64_t kPartUnit = 64;  // a step of either kernel

// How many parts, none of them empty; `length` receives their pixels.
int parts_of(Element element, const ConvGeometry& g, int64_t& length) {
  const int64_t rows = g.k / g.groups, columns = int64_t{g.r} * g.s * (g.c / g.groups), pixels = g.n * g.p * g.q;
  const int64_t on_hopper = conv2d_weight_tiles_sm90(element, g);
  const int64_t wanted = on_hopper ? multiprocessors() / on_hopper : kWantedBlocks / tiles(rows, columns, g.groups, 64);
  const int64_t most = pixels / kLeastOfAPart;
  int64_t parts = wanted < most ? wanted : most;
  if (parts < ceil_div(pixels, kMostOfAPart)) parts = ceil_div(pixels, kMostOfAPart);
  length = ceil_div(ceil_div(pixels, parts < 1 ? 1 : parts), kPartUnit) * kPartUnit;
  return static_cast<int>(ceil_div(pixels, length));
}

}  // namespace

int conv2d_weight_parts(Element element, const ConvGeometry& g) {
  if (g.depthwise()) return depthwise_weight_parts(element, g);
  int64_t length;
  return parts_of(element, g, length);
}

void conv2d_backward_weight(Element element, const ConvGeometry& g, const ConvTensor& dy, const ConvTensor& x,
                            float* parts, const ConvResult& dw, void* stream) {
  if (g.depthwise()) return depthwise_backward_weight(element, g, dy, x, parts, dw, stream);
  int64_t length;
  const int count = parts_of(element, g, length);
  if (conv2d_backward_weight_sm90(element, g, dy, x, count > 1 ? parts : nullptr, count, length, dw, stream)) return;
  const int64_t channels = g.c / g.groups, filters = g.k / g.groups;
  Product product{};
  product.a = {dy.data, last_step(dy.c), image_steps(dy), filters * dy.c, 1, 1, dy.c == 1};
  product.b = {x.data, tap_steps(g, x), pixel_steps(g, x), channels * x.c, g.h, g.w, x.c == 1};
  product.k_last = FastDivide(g.q);
  product.n = g.r * g.s * channels;
  product.column_middle = static_cast<uint32_t>(g.s), product.column_last = static_cast<uint32_t>(channels);
  product.groups = static_cast<uint32_t>(g.groups);
  product.row = last_step(dw.n), product.column = {dw.h, dw.w, dw.c};
  product.result_group = filters * dw.n;
  product.result = count > 1 ? parts : dw.data;
  if (count > 1) product.part_length = length, product.part_stride = g.k * product.n;
  Class& c = product.classes[0];
  c.m = filters, c.k = g.n * g.p * g.q;
  c.row_middle = 1, c.row_last = static_cast<uint32_t>(filters);
  c.k_middle = FastDivide(g.p);
  c.b_origin = first_pixel(g, x);
  const bool vectors = conv2d_takes_vectors(element, g) && has_vectors(element, dy) && has_vectors(element, x);
  launch_on<Stored::k_first, Stored::k_first>(element, vectors, product, c.m, count, stream);
}

}  // namespace dlkern::cuda
