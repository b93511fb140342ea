// Which kernel runs a network, how it divides shared memory, and over how many blocks the rows are split.
#include "density_mlp.h"

#include <algorithm>
#include <cstring>
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
    return "weights (" + std::to_string(plan->tiles * plan->stage_bytes >> 10) + " KB) and the vectors of a row (" +
           std::to_string(table_bytes >> 10) + " KB) do not fit " + std::to_string(shared_limit >> 10) +
           " KB of shared memory" + (wgmma ? "" : ", and this architecture's kernel does not stream weights");
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
  p.batch = sizes[0], p.rows_total = sizes[1], p.dimensions = sizes[2];
  p.row_stride = sizes[3], p.sample_stride = sizes[4], p.pair_stride = sizes[5];
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

// As many parts of the rows as make the longest multiprocessor's work shortest; a part costs about a row to start.
static int best_splits(int tiles, int rows, int multiprocessors) {
  int64_t least = INT64_MAX;
  int best = 1;
  for (int splits = 1; splits <= std::min(rows, 2 * multiprocessors); ++splits) {
    const int64_t waves = (static_cast<int64_t>(tiles) * splits + multiprocessors - 1) / multiprocessors;
    const int64_t work = waves * ((rows + splits - 1) / splits + 1);
    if (work < least) least = work, best = splits;
  }
  return best;
}

void density_mlp(DensityMlp p, const Plan& chosen, const Config& config, int multiprocessors, cudaStream_t stream) {
  if (p.batch == 0 || p.rows_total == 0) return;
  Plan plan = chosen;
  int tiles = (p.batch + plan.samples - 1) / plan.samples;
  if (config.cluster > 0 && plan.stages < plan.tiles) plan.cluster = config.cluster;
  while (plan.cluster > tiles) plan.cluster /= 2;
  tiles = static_cast<int>(round_up(tiles, plan.cluster));
  int splits = config.splits > 0 ? config.splits : best_splits(tiles, p.rows_total, multiprocessors);
  p.rows_per_block = (p.rows_total + splits - 1) / splits;
  splits = (p.rows_total + p.rows_per_block - 1) / p.rows_per_block;
  p.stages = plan.stages, p.tiles = plan.tiles, p.table_stages = plan.table_stages;
  p.stage_bytes = plan.stage_bytes, p.tables_at = plan.tables_at;
  p.scratch_at = plan.scratch_at, p.barriers_at = plan.barriers_at;
  const auto launch = !plan.wgmma ? sm80_density_mlp : plan.hidden > 256 ? sm90_density_mlp_wide : sm90_density_mlp;
  launch(p, plan, tiles, splits, stream);
}

}  // namespace fastscore
