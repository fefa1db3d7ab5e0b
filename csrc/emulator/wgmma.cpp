// The barriers, copies and products of sm_90a, as the PTX ISA has them.
#include "wgmma.h"

#include <cuda_runtime_api.h>

#include <cstring>

#include "warp.h"

#define UNSEEN __attribute__((no_sanitize("thread")))

namespace fluxkern::emulator {
namespace {

constexpr int BARRIERS = 16, LOADS = 64, PRODUCTS = 32, THREADS = 1024, AXES = 4;
constexpr int ATOM_ROW = 128;  // bytes
constexpr uint32_t UNDER_WAY = 0x7fa5a5a5;  // a NaN that arithmetic does not leave as it is

// Of 128-byte swizzles: chunks of 16 bytes change places by the row of the atom they lie in.
constexpr unsigned swizzled(unsigned address) {
    return address ^ (address / ATOM_ROW % 8) << 4;
}

UNSEEN char* shared_at(unsigned address) {
    return static_cast<char*>(self().shared) + address;
}

// mbarrier: a phase ends when all have arrived and all bytes they expect have come

struct Phases {
    uint16_t expected, pending;
    int32_t bytes : 31;
    uint32_t phase : 1;
};
static_assert(sizeof(Phases) == sizeof(uint64_t));

UNSEEN Phases& phases_of(void* barrier) {
    Phases& phases = *static_cast<Phases*>(barrier);
    if (phases.expected == 0xffff) stop("a barrier is used before it is begun");
    return phases;
}

UNSEEN void end_phase(Phases& phases) {
    if (phases.pending != 0 || phases.bytes != 0) return;
    phases.pending = phases.expected;
    phases.phase ^= 1;
}

UNSEEN bool phase_is_over(const void* barrier, uint64_t parity) {
    return static_cast<const Phases*>(barrier)->phase != parity;
}

// bar.sync, bar.arrive

struct Named {
    int64_t block;
    int threads, arrived;
    uint64_t phase;
};
Named named[BARRIERS];

UNSEEN bool named_is_over(const void* barrier, uint64_t phase) {
    return static_cast<const Named*>(barrier)->phase != phase;
}

// TMA

struct Map {  // in the bytes of a CUtensorMap
    const char* data;
    uint64_t sizes[AXES], strides[AXES - 1];
    uint32_t box[AXES];
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

UNSEEN Map map_in(const CUtensorMap& bytes) {
    Map map;
    std::memcpy(static_cast<void*>(&map), &bytes, sizeof(map));
    return map;
}

struct Load {
    char* shared;
    unsigned to;
    Map map;
    std::array<int, AXES> first;
    void* barrier;
    int64_t block;
    bool under_way;
};
Load loads[LOADS];

UNSEEN int bytes_of(const Map& map) {
    return int(2 * map.box[0] * map.box[1] * map.box[2] * map.box[3]);
}

void put(char* to, const char* from) {  // seen by sanitizers
    if (from == nullptr) std::memset(to, 0, 2);
    if (from != nullptr) std::memcpy(to, from, 2);
}

UNSEEN const char* element_at(const Load& load, const unsigned (&at)[AXES]) {
    const char* from = load.map.data;
    for (int axis = 0; axis < AXES; ++axis) {
        const int64_t i = int64_t(load.first[axis]) + at[axis];
        if (i < 0 || uint64_t(i) >= load.map.sizes[axis]) return nullptr;
        from += uint64_t(i) * (axis == 0 ? 2 : load.map.strides[axis - 1]);
    }
    return from;
}

UNSEEN void copy_box(const Load& load) {
    const uint32_t* const box = load.map.box;
    unsigned to = load.to;
    for (unsigned b = 0; b < box[3]; ++b) {
        for (unsigned h = 0; h < box[2]; ++h) {
            for (unsigned l = 0; l < box[1]; ++l) {
                for (unsigned d = 0; d < box[0]; ++d, to += 2) {
                    put(load.shared + swizzled(to), element_at(load, {d, l, h, b}));
                }
            }
        }
    }
}

UNSEEN void perform(const Load& load) {
    acquire(const_cast<Load*>(&load));
    copy_box(load);
    release(load.barrier);
    Phases& phases = *static_cast<Phases*>(load.barrier);
    phases.bytes -= bytes_of(load.map);
    end_phase(phases);
}

// None that nobody waits for: so late that a wait which is missing is seen.
UNSEEN bool perform_load(bool anything) {
    for (Load& load : loads) {
        if (!load.under_way || load.block != block_serial()) continue;
        if (!anything && !is_waited_for(load.barrier)) continue;
        load.under_way = false;
        perform(load);
        return true;
    }
    return false;
}

[[maybe_unused]] const bool registered = (beside = &perform_load, true);

// wgmma

struct UnderWay {
    Product product;
    int group;
    uint32_t a[4];     // as it began
    float before[64];  // c, of the first product under way that adds to it
    bool first;
};

struct Products {
    int64_t block;
    int first, count, groups;
    bool begun;  // wgmma.fence since the last wait
    UnderWay ring[PRODUCTS];

    UNSEEN UnderWay& operator[](int i) {
        return ring[(first + i) % PRODUCTS];
    }
};
Products products[THREADS];

UNSEEN Products& own_products() {
    Products& own = products[self().linear];
    if (own.block != block_serial()) own.first = own.count = own.groups = 0, own.begun = false;
    own.block = block_serial();
    return own;
}

// Matrix Descriptor Format of wgmma: 128-byte swizzle, patterns that begin at multiples of 1024.
struct Matrix {
    unsigned address, leading, stride;

    UNSEEN explicit Matrix(uint64_t bits)
        : address(unsigned(bits & 0x3fff) << 4),
          leading(unsigned(bits >> 16 & 0x3fff) << 4),
          stride(unsigned(bits >> 32 & 0x3fff) << 4) {
        if (bits >> 62 != 1) stop("a matrix is not swizzled by 128 bytes");
        if (bits >> 49 & 7) stop("a pattern begins within an atom");
    }
    // Strides of canonical layouts: K-major ((8, m), k) : ((128 B, stride), 1)
    UNSEEN unsigned k_contiguous(int row, int k) const {
        return swizzled(address + row / 8 * stride + row % 8 * ATOM_ROW + k * 2);
    }
    // MN-major ((64, n), (8, k)) : ((1, leading), (128 B, stride))
    UNSEEN unsigned n_contiguous(int n, int k) const {
        return swizzled(address + n / 64 * leading + n % 64 * 2 + k / 8 * stride +
                        k % 8 * ATOM_ROW);
    }
};

uint32_t pair_at(const char* shared) {  // seen by sanitizers
    uint32_t bits;
    std::memcpy(&bits, shared, sizeof(bits));
    return bits;
}

struct Rows {  // two of a, g and g + 8 of the warp's 16
    float x[2][16];
};

UNSEEN void put_pair(float* to, float2 pair) {
    to[0] = pair.x;
    to[1] = pair.y;
}

UNSEEN Rows rows_in_registers(const UnderWay& one, Site site) {
    const Product& p = one.product;
    Operands mine = {};
    std::memcpy(mine.a, p.a, sizeof(mine.a));
    if (std::memcmp(mine.a, one.a, sizeof(mine.a)) != 0) {
        stop("registers of a product are written while it is under way");
    }
    const auto all = gather(mine, site);
    Rows rows;
    for (int t = 0; t < 4; ++t) {
        for (int i = 0; i < 4; ++i) {  // Register fragments of A, as of mma.m16n8k16
            const uint32_t bits = all[lane() / 4 * 4 + t].a[i];
            put_pair(&rows.x[i % 2][i / 2 * 8 + 2 * t], p.widen(bits));
        }
    }
    return rows;
}

UNSEEN Rows rows_in_shared(const Product& p) {
    const Matrix a(p.a_at);
    Rows rows;
    for (int row = 0; row < 2; ++row) {
        const int m = self().linear / WARP % 4 * 16 + 8 * row + lane() / 4;
        for (int k = 0; k < 16; k += 2) {
            put_pair(&rows.x[row][k], p.widen(pair_at(shared_at(a.k_contiguous(m, k)))));
        }
    }
    return rows;
}

// Columns n and n + 1 of b.
UNSEEN void columns_of(const Product& p, const Matrix& b, int n, float (&out)[2][16]) {
    for (int k = 0; k < 16; k += p.b_transposed ? 1 : 2) {
        if (p.b_transposed) {
            const float2 pair = p.widen(pair_at(shared_at(b.n_contiguous(n, k))));
            out[0][k] = pair.x;
            out[1][k] = pair.y;
            continue;
        }
        for (int j = 0; j < 2; ++j) {
            put_pair(&out[j][k], p.widen(pair_at(shared_at(b.k_contiguous(n + j, k)))));
        }
    }
}

UNSEEN void restore(UnderWay& one) {
    for (int i = 0; i < one.product.count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, &one.product.c[i], sizeof(bits));
        if (bits != UNDER_WAY) stop("sums of a product are written while it is under way");
        std::memcpy(&one.product.c[i], &one.before[i], sizeof(float));
    }
}

UNSEEN void perform(UnderWay& one, Site site) {
    const Product& p = one.product;
    const Rows rows = p.a != nullptr ? rows_in_registers(one, site) : rows_in_shared(p);
    if (one.first) restore(one);
    const Matrix b(p.b_at);
    float columns[2][16];
    for (int tile = 0; tile < p.count / 4; ++tile) {
        columns_of(p, b, 8 * tile + lane() % 4 * 2, columns);
        for (int row = 0; row < 2; ++row) {
            for (int j = 0; j < 2; ++j) {
                float sum = 0;
                for (int k = 0; k < 16; ++k) sum += rows.x[row][k] * columns[j][k];
                float& c = p.c[4 * tile + 2 * row + j];
                c = p.add ? c + sum : sum;
            }
        }
    }
}

}  // namespace

UNSEEN unsigned shared_address(const void* p) {
    return unsigned(static_cast<const char*>(p) - static_cast<const char*>(self().shared));
}

UNSEEN void start_barrier(void* barrier, int arrivals) {
    give_way();  // to those that do not wait for it
    *static_cast<Phases*>(barrier) = {uint16_t(arrivals), uint16_t(arrivals), 0, 0};
}

// The last to arrive lets those that wait go on before it does itself.
UNSEEN void arrive(void* barrier, int bytes) {
    Phases& phases = phases_of(barrier);
    release(barrier);
    if (phases.pending == 0) stop("more arrive than a barrier expects");
    phases.bytes += bytes;
    --phases.pending;
    end_phase(phases);
    give_way();
}

UNSEEN void wait_for_phase(const void* barrier, unsigned parity, Site site) {
    phases_of(const_cast<void*>(barrier));
    wait_until(phase_is_over, barrier, parity, site);
    acquire(const_cast<void*>(barrier));
}

UNSEEN void named_barrier(int id, int threads, bool waits, Site site) {
    Named& barrier = named[id];
    if (barrier.block != block_serial()) barrier = {block_serial(), threads, 0, 0};
    if (barrier.arrived == 0) barrier.threads = threads;
    if (barrier.threads != threads) stop("a named barrier is of as many threads as others say");
    const uint64_t phase = barrier.phase;
    release(&barrier);
    if (++barrier.arrived == threads) barrier.arrived = 0, ++barrier.phase;
    if (!waits) return;
    wait_until(named_is_over, &barrier, phase, site);
    acquire(&barrier);
}

UNSEEN void load_box(void* to, const CUtensorMap& map, const std::array<int, 4>& first,
                     void* barrier) {
    int free = 0;
    while (free < LOADS && loads[free].under_way && loads[free].block == block_serial()) ++free;
    if (free == LOADS) stop("too many copies are under way");
    Load& load = loads[free];
    load.under_way = true;
    load.shared = static_cast<char*>(self().shared);
    load.to = shared_address(to);
    load.map = map_in(map);
    load.first = first;
    load.barrier = barrier;
    load.block = block_serial();
    if (load.to % ATOM_ROW != 0) stop("a copy goes to no multiple of 128 bytes");
    std::memset(to, 0xff, bytes_of(load.map));
    release(&load);
}

UNSEEN void start_product(const Product& product) {
    Products& own = own_products();
    if (!own.begun) stop("a product has begun without a fence");
    if (own.count == PRODUCTS) stop("too many products are under way");
    UnderWay& one = own[own.count];
    one.product = product;
    one.group = own.groups;
    one.first = true;
    for (int i = 0; i < own.count; ++i) one.first &= own[i].product.c != product.c;
    ++own.count;
    if (product.a != nullptr) std::memcpy(one.a, product.a, sizeof(one.a));
    ++self().products;
    if (!one.first) return;
    for (int i = 0; i < product.count; ++i) {
        std::memcpy(&one.before[i], &product.c[i], sizeof(float));
        std::memcpy(&product.c[i], &UNDER_WAY, sizeof(float));
    }
}

UNSEEN void begin_products() {
    own_products().begun = true;
}

UNSEEN void end_products() {
    ++own_products().groups;
}

UNSEEN void wait_for_products(int left, Site site) {
    Products& own = own_products();
    while (own.count > 0 && own[0].group < own.groups - left) {
        perform(own[0], site);
        own.first = (own.first + 1) % PRODUCTS;
        --own.count;
        --self().products;
    }
    own.begun = false;
    warp_barrier(~0u, site);  // products are of a warp, so they end for all of its lanes
}

}  // namespace fluxkern::emulator

// The driver's functions that the launchers use

namespace {

using fluxkern::emulator::Map;

// What cuTensorMapEncodeTiled says of its arguments, of four axes of 16 bits swizzled by 128 bytes.
bool is_map(uint32_t axes, const void* data, const cuuint64_t* sizes, const cuuint64_t* strides,
            const cuuint32_t* box, const cuuint32_t* steps) {
    bool right = axes == 4 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && box[0] * 2 <= 128 &&
                 box[0] * 2 % 16 == 0;
    for (int axis = 0; axis < 4; ++axis) {
        right &= sizes[axis] >= 1 && sizes[axis] <= uint64_t(1) << 32;
        right &= box[axis] >= 1 && box[axis] <= 256 && steps[axis] == 1;
        if (axis < 3) right &= strides[axis] % 16 == 0 && strides[axis] < uint64_t(1) << 40;
    }
    return right;
}

CUresult encode(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t axes, void* data,
                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                const cuuint32_t* steps, CUtensorMapInterleave interleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
    const bool known = (type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ||
                        type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16) &&
                       interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
                       swizzle == CU_TENSOR_MAP_SWIZZLE_128B &&
                       fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
    if (!known || !is_map(axes, data, sizes, strides, box, steps)) return CUDA_ERROR_INVALID_VALUE;
    Map map = {static_cast<const char*>(data), {}, {}, {}};
    std::memcpy(map.sizes, sizes, sizeof(map.sizes));
    std::memcpy(map.strides, strides, sizeof(map.strides));
    std::memcpy(map.box, box, sizeof(map.box));
    std::memcpy(static_cast<void*>(out), &map, sizeof(map));
    return CUDA_SUCCESS;
}

}  // namespace

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned, unsigned long long,
    cudaDriverEntryPointQueryResult* found) {
    const bool there = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
    *function = there ? reinterpret_cast<void*>(&encode) : nullptr;
    *found = there ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
