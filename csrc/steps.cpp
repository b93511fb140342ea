// Which kernel runs a program of steps, and how it divides shared memory.
#include "steps.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace fastscore {
namespace {

constexpr int kBarrierBytes = 16;  // a stage's: full and empty

uint32_t round_up(uint32_t value, uint32_t to) { return (value + to - 1) / to * to; }

// Bytes beside weights and records.
uint32_t scratch_of(const StepsPlan& plan) {
  if (plan.hidden == 1024) return kPairScratchBytes;
  if (plan.hidden == 512) return kWideScratchBytes;
  // x, Q and M of a sample take 12 bytes a dimension, a saved tile 2 a column.
  const uint32_t saved = plan.hidden == 256 ? 2u * plan.samples * plan.hidden : 0;
  return plan.kept ? 12u * plan.samples * plan.data : saved;
}

// Divide shared memory into weights, samples, records and barriers; false if it does not hold them.
bool divide(StepsPlan* plan, uint32_t record_bytes, uint32_t limit) {
  plan->scratch_at = plan->stages * plan->stage_bytes;
  plan->records_at = plan->scratch_at + scratch_of(*plan);
  plan->barriers_at = plan->records_at + plan->record_stages * record_bytes;
  plan->shared_bytes = plan->barriers_at + kBarrierBytes * (plan->barriers + plan->record_stages);
  return plan->shared_bytes <= limit;
}

// A division of shared memory to be tried.
struct Candidate {
  bool kept;      // keys and x of a tile, which every row reads, rather than fetched through the L1 cache
  bool resident;  // all weights, rather than a ring of `fewest` stages or more
  int record_stages;
};

// Weights that stay are worth more than a third record, and in a ring that keeps two warpgroups apart, four stages, keys
// and x are worth more than a longer one.
constexpr Candidate kCandidates[] = {{true, true, 3},  {true, true, 2},   {true, false, 2}, {false, true, 3},
                                     {false, true, 2}, {false, false, 2}, {false, false, 1}};
constexpr int kFewestStages = 4, kMostStages = 16, kWideStages = 8;  // of widths from 512 on exactly so many

bool fit(StepsPlan* plan, uint32_t record_bytes, uint32_t limit) {
  const bool may_stream = plan->hidden > 64, may_stay = plan->hidden <= 128;
  for (const Candidate& candidate : kCandidates) {
    if (candidate.kept ? plan->hidden > 128 : plan->hidden <= 128 && plan->data == 16) continue;  // see `for_variant`
    if (candidate.resident ? !may_stay : !may_stream) continue;
    plan->kept = candidate.kept, plan->record_stages = candidate.record_stages;
    plan->cluster = candidate.resident ? 1 : 2;
    const int fewest = candidate.resident ? plan->tiles : plan->hidden >= 512 ? kWideStages : kFewestStages;
    // A ring that never stays may have more stages than a row has: it turns on.
    const int most = candidate.resident    ? plan->tiles
                     : plan->hidden >= 512 ? kWideStages
                     : may_stay            ? plan->tiles - 1
                                           : kMostStages;
    for (plan->stages = most; plan->stages >= fewest; --plan->stages) {
      plan->barriers = may_stream ? plan->stages : 1;
      if (divide(plan, record_bytes, limit)) return true;
    }
  }
  return false;
}

// The least that a plan could do with, in words.
std::string least(StepsPlan plan, uint32_t record_bytes) {
  plan.kept = plan.hidden <= 128 && plan.data == 16;
  const int fewest = plan.hidden == 64 ? plan.tiles : plan.hidden >= 512 ? kWideStages : kFewestStages;
  const bool one_record = plan.hidden > 64 && !plan.kept;
  std::string found = plan.hidden == 64 ? "weights" : "a ring of " + std::to_string(fewest) + " stages";
  found += " (" + kilobytes(fewest * plan.stage_bytes) + "), ";
  if (const uint32_t scratch = scratch_of(plan)) {
    found += plan.hidden >= 512 ? "operands" : plan.hidden == 256 ? "a saved tile" : "keys and x";
    found += " (" + kilobytes(scratch) + "), ";
  }
  return found + (one_record ? "a row's vectors (" : "two rows' vectors (") +
         kilobytes(one_record ? record_bytes : 2 * record_bytes) + ")";
}

// Throws where a caller asks for clusters that a kernel is not made for.
void check_cluster(int cluster, const StepsPlan& plan) {
  const int most = plan.parts == 2 ? 2 : 4;
  if (cluster == 1 || cluster == 2 || cluster == most) return;
  throw std::runtime_error("clusters of width " + std::to_string(plan.hidden) + " are of " +
                           (most > 2 ? "1, 2 or 4" : "1 or 2") + ", got " + std::to_string(cluster));
}

}  // namespace

std::string plan_steps(int hidden, int data, bool padded, int linears, int record, int capability, int shared_limit,
                       StepsPlan* plan) {
  if (capability != 90) return "steps run on compute capability 9.0";
  *plan = {};
  plan->hidden = hidden, plan->data = data, plan->padded = padded;
  plan->parts = hidden == 1024 ? 2 : 1;
  if (hidden == 1024) {  // the same of each of two blocks' outputs, in stages of half the size
    plan->stage_bytes = 256 * 16 * 2;
    plan->tiles = 2 * (4 + 64 * (linears - 2) + 4);
  } else if (hidden == 512) {  // two rings of half the outputs each
    plan->stage_bytes = 256 * 32 * 2;
    plan->tiles = 2 * (2 + 16 * (linears - 2) + 2);
  } else {
    // Tiles of up to 128 outputs x 64 inputs; those of the last product, of fewer outputs, share stages.
    const int inner = hidden / 64, outer = (hidden + 127) / 128;
    plan->stage_bytes = 128 * std::min(128, hidden);
    plan->tiles = outer + (linears - 2) * inner * outer;
    plan->tiles += static_cast<int>((inner * 128 * data + plan->stage_bytes - 1) / plan->stage_bytes);
  }
  const int consumers = hidden == 64 ? 3 : 2;
  plan->samples = hidden >= 512 ? 64 : 64 * consumers;
  plan->threads = 128 * (consumers + 1);
  const uint32_t record_bytes = round_up(4 * record, 128);
  if (fit(plan, record_bytes, shared_limit)) return "";
  return least(*plan, record_bytes) + " of steps do not fit " + kilobytes(shared_limit) + " of shared memory";
}

Steps step_arguments(const uint64_t* pointers, const int32_t* sizes, const int32_t* columns, const char* steps,
                     size_t bytes) {
  Steps p = {};
  p.x = reinterpret_cast<const float*>(pointers[0]);
  p.keys = reinterpret_cast<const uint32_t*>(pointers[1]);
  p.weights = reinterpret_cast<const uint8_t*>(pointers[2]);
  p.records = reinterpret_cast<const float*>(pointers[3]);
  p.f = reinterpret_cast<float*>(pointers[4]);
  p.batch = sizes[0], p.rows = sizes[1], p.record = sizes[2];
  p.pre_scale = columns[0], p.post_scale = columns[1], p.skip = columns[2], p.compare_at = columns[3];
  if (bytes < 2 * sizeof(Step) || bytes > (kMaxSteps + 2) * sizeof(Step) || bytes % sizeof(Step) != 0) {
    throw std::runtime_error("steps are a first, a last and up to " + std::to_string(kMaxSteps) + " between, " +
                             std::to_string(sizeof(Step)) + " bytes each, got " + std::to_string(bytes) + " bytes");
  }
  p.count = static_cast<int32_t>(bytes / sizeof(Step)) - 2;
  std::memcpy(&p.first, steps, sizeof(Step));
  std::memcpy(&p.last, steps + sizeof(Step), sizeof(Step));
  std::memcpy(p.step, steps + 2 * sizeof(Step), p.count * sizeof(Step));
  return p;
}

void launch_steps(Steps p, const StepsPlan& plan, StepsConfig config, cudaStream_t stream) {
  if (p.batch == 0 || p.rows == 0) return;
  // Weights that stay need no partner, and one tile of samples would leave it idle.
  if (config.cluster <= 0) config.cluster = p.batch > plan.samples ? plan.cluster : 1;
  if (plan.cluster == 1) config.cluster = 1;
  check_cluster(config.cluster, plan);
  p.barriers = plan.barriers;
  p.stages = plan.stages, p.tiles = plan.tiles, p.record_stages = plan.record_stages;
  p.scratch_at = plan.scratch_at, p.records_at = plan.records_at, p.barriers_at = plan.barriers_at;
  const auto launch = plan.hidden == 64    ? sm90_steps_64
                      : plan.hidden == 128 ? sm90_steps_128
                      : plan.hidden == 256 ? sm90_steps_256
                      : plan.hidden == 512 ? sm90_steps_512
                                           : sm90_steps_1024;
  launch(p, plan, config, stream);
}

}  // namespace fastscore
