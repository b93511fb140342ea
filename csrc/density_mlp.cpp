// Which kernel runs a network, how it divides shared memory, and over how many blocks the rows are split.
#include "density_mlp.h"

#include <common/error.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>

namespace fastscore {
namespace {

uint32_t round_up(uint32_t value, uint32_t to) { return (value + to - 1) / to * to; }

// Divide shared memory into weight stages, scratch, vector stages and barriers; false if it does not hold them.
bool divide(Plan* plan, uint32_t scratch, uint32_t table_bytes, uint32_t limit) {
  plan->scratch_at = plan->stages * plan->stage_bytes;
  plan->tables_at = plan->scratch_at + scratch;
  plan->barriers_at = plan->tables_at + plan->table_stages * table_bytes;
  plan->shared_bytes = plan->barriers_at + 16 * (plan->stages + plan->table_stages);
  return plan->shared_bytes <= limit;
}

// All weights in shared memory, or as many stages of a ring as fit beside the rest: four at least, so that copies stay
// ahead of two consumers, before a second row's vectors, and two at the very least, since a consumer holds the stage
// before the one it waits for.
//
// Width 512 takes four in any case: of every four, each of its warpgroups waits for two before it releases the others.
bool fit(Plan* plan, uint32_t scratch, uint32_t table_bytes, uint32_t limit, bool may_stream) {
  plan->stages = plan->tiles;
  for (plan->table_stages = 3; plan->table_stages >= (may_stream ? 2 : 3); --plan->table_stages) {
    if (divide(plan, scratch, table_bytes, limit)) return true;
  }
  if (!may_stream) return false;
  for (plan->table_stages = 2; plan->table_stages >= 1; --plan->table_stages) {
    const int fewest = plan->table_stages == 2 || plan->hidden == 512 ? 4 : 2;
    for (plan->stages = plan->tiles - 1; plan->stages >= fewest; --plan->stages) {
      if (divide(plan, scratch, table_bytes, limit)) return true;
    }
  }
  return false;
}

}  // namespace

std::string plan(int hidden, int data, int linears, int row_stride, int capability, int shared_limit, Plan* plan) {
  const bool wgmma = capability == 90;  // later architectures have other instructions
  const bool narrow = hidden <= 128, wide = hidden > 256;
  const int widest = wgmma ? 512 : 128;
  if (hidden > widest) {
    return "hidden widths go up to " + std::to_string(widest) + " on compute capability " +
           std::to_string(capability / 10) + "." + std::to_string(capability % 10) + ", the network has " +
           std::to_string(hidden);
  }
  *plan = {};
  plan->hidden = hidden, plan->data = data, plan->wgmma = wgmma;
  const int parts = hidden > 128 ? hidden / 128 : 1, blocks = hidden / 64;
  plan->tiles = (plan->data + 63) / 64 * parts + (linears - 2) * blocks * parts + blocks;
  plan->stage_bytes = 128 * std::min(128, std::max(hidden, plan->data));
  const int consumers = wgmma && hidden == 64 ? 3 : 2;
  plan->samples = wide ? 64 : 64 * consumers;
  plan->threads = wgmma ? 128 * (consumers + 1) : 256;
  const uint32_t scratch = wide ? kWideScratch : 256u * consumers * (narrow ? plan->data : hidden);
  const uint32_t table_bytes = round_up(4 * row_stride, 128);
  if (!fit(plan, scratch, table_bytes, shared_limit, wgmma)) {
    const int fewest = wgmma ? std::min(plan->tiles, wide ? 4 : 2) : plan->tiles;
    const std::string weights = wgmma ? "a ring of " + std::to_string(fewest) + " stages" : "weights";
    const char* tile = wide ? "operands" : narrow ? "noise" : "a saved tile";
    const char* records = wgmma ? "a row's vectors" : "three rows' vectors";
    return weights + " (" + kilobytes(fewest * plan->stage_bytes) + "), " + tile + " (" + kilobytes(scratch) + "), " +
           records + " (" + kilobytes(wgmma ? table_bytes : 3 * table_bytes) + ") do not fit " +
           kilobytes(shared_limit) + " of shared memory" +
           (wgmma ? "" : ", and this architecture's kernel does not stream weights");
  }
  plan->cluster = plan->stages >= plan->tiles ? 1 : 256 / plan->samples;  // 256 samples read what they load once
  return "";
}

DensityMlp arguments(const uint64_t* pointers, const int32_t* sizes, const int32_t* operands, const char* program,
                     size_t bytes) {
  DensityMlp p = {};
  p.x = reinterpret_cast<const float*>(pointers[0]);
  p.keys = reinterpret_cast<const uint32_t*>(pointers[1]);
  p.points = reinterpret_cast<const uint32_t*>(pointers[2]);
  p.rows = reinterpret_cast<const float*>(pointers[3]);
  p.weights = reinterpret_cast<const uint8_t*>(pointers[4]);
  p.row_table = reinterpret_cast<const float*>(pointers[5]);
  p.sample_table = reinterpret_cast<const float*>(pointers[6]);
  p.pair_table = reinterpret_cast<const float*>(pointers[7]);
  p.f = reinterpret_cast<float*>(pointers[8]);
  p.batch = sizes[0], p.rows_total = sizes[1];
  p.row_stride = sizes[2], p.sample_stride = sizes[3], p.pair_stride = sizes[4];
  p.pre_scale = operands[0], p.pre_shift = operands[1];
  p.post_scale = operands[2], p.post_shift = operands[3], p.post_skip = operands[4];
  p.keep = operands[5], p.pull = operands[6], p.offset = operands[7];
  if (bytes > sizeof p.program || bytes % sizeof(Instruction) != 0) {
    throw std::runtime_error("a program is up to " + std::to_string(kMaxInstructions) + " instructions of " +
                             std::to_string(sizeof(Instruction)) + " bytes, got " + std::to_string(bytes) + " bytes");
  }
  std::memcpy(p.program, program, bytes);
  p.count = static_cast<int32_t>(bytes / sizeof(Instruction));
  return p;
}

Division division(const Plan& plan, int batch, int rows, const Config& config, const std::function<int(int)>& active) {
  const int tiles = (batch + plan.samples - 1) / plan.samples;
  if (config.cluster > 4 || config.cluster == 3) {  // each copies a part of a stage, of a power of two
    throw std::runtime_error("clusters are of 1, 2 or 4 blocks, got " + std::to_string(config.cluster));
  }
  int largest = config.cluster > 0 && plan.stages < plan.tiles ? config.cluster : plan.cluster;
  while (largest > tiles) largest /= 2;
  // A block alone would load every weight for itself: from two tiles on, two blocks share them at least.
  const int smallest = config.cluster > 0 ? largest : std::min(largest, 2);
  Division best = {};
  int64_t least = INT64_MAX;
  for (int cluster = largest; cluster >= (best.cluster > 0 ? smallest : 1); cluster /= 2) {
    const int at_once = cluster > 1 ? active(cluster) : std::max(1, active(1));
    if (at_once == 0) continue;  // this device runs no cluster of that size
    const int padded = static_cast<int>(round_up(tiles, cluster));
    // The longest block's rows, in as many waves as the clusters need; a block costs about a row to start.
    const int few = config.splits > 0 ? std::min(rows, config.splits) : 1;
    const int many = config.splits > 0 ? few : std::min(rows, 2 * cluster * at_once);
    for (int asked = few; asked <= many; ++asked) {
      const int each = (rows + asked - 1) / asked, splits = (rows + each - 1) / each;
      const int64_t clusters = static_cast<int64_t>(padded / cluster) * splits;
      const int64_t work = (clusters + at_once - 1) / at_once * (each + 1);
      if (work < least) least = work, best = {cluster, padded, splits, each};
    }
  }
  return best;
}

// How many clusters of a kernel's blocks the current device runs at once; asking costs more than a launch, so it is
// asked once.
static int active_clusters(Plan plan, int cluster) {
  static std::mutex mutex;
  static std::map<std::array<uint64_t, 5>, int> known;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  plan.cluster = cluster;
  const std::lock_guard<std::mutex> lock(mutex);
  const uint64_t kernel = 2 * static_cast<uint64_t>(plan.hidden) + plan.wgmma;
  int& found = known[{static_cast<uint64_t>(device), kernel, static_cast<uint64_t>(plan.data), plan.shared_bytes,
                      static_cast<uint64_t>(cluster)}];
  if (found == 0) {
    found = !plan.wgmma         ? sm80_density_mlp_clusters(plan)
            : plan.hidden > 256 ? sm90_density_mlp_wide_clusters(plan)
                                : sm90_density_mlp_clusters(plan);
  }
  return found;
}

void density_mlp(DensityMlp p, const Plan& chosen, const Config& config, cudaStream_t stream) {
  if (p.batch == 0 || p.rows_total == 0) return;
  Plan plan = chosen;
  const Division divided =
      division(plan, p.batch, p.rows_total, config, [&](int cluster) { return active_clusters(plan, cluster); });
  plan.cluster = divided.cluster;
  p.rows_per_block = divided.rows_per_block;
  p.stages = plan.stages, p.tiles = plan.tiles, p.table_stages = plan.table_stages;
  p.stage_bytes = plan.stage_bytes, p.tables_at = plan.tables_at;
  p.scratch_at = plan.scratch_at, p.barriers_at = plan.barriers_at;
  const auto launch = !plan.wgmma ? sm80_density_mlp : plan.hidden > 256 ? sm90_density_mlp_wide : sm90_density_mlp;
  launch(p, plan, divided.tiles, divided.splits, stream);
}

}  // namespace fastscore
