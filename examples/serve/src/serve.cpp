#include "serve.hpp"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <new>
#include <thread>

#include "audit.hpp"
#include "engine.hpp"
#include "error.hpp"
#include "options.hpp"
#include "report.hpp"
#include "server.hpp"
#include "weights.hpp"

namespace serve {
namespace {

using indexcache::Context;
using indexcache::Plan;

// A plan and the engine that runs it.
struct Arm {
  Arm(const char* name, const Model& model, const Context& context, const Plan& plan, Threads& threads, EngineSize size)
      : plan(plan), engine(model, context, plan, threads, size) {
    const idxc_plan_info info = check(plan.info());
    run.name = name;
    run.pattern = check(plan.export_text(IDXC_EXPORT_PATTERN));
    run.fingerprint = info.fingerprint;
    run.full_layers = info.full_layers;
    run.shared_layers = info.shared_layers;
    run.index_k_bytes_per_token = info.index_k_bytes_per_token;
    run.index_k_bytes = engine.stores().index_k_bytes();
  }

  const Plan& plan;
  Engine engine;
  Run run;
};

idxc_model_desc describe(const Config& config) {
  idxc_model_desc desc = IDXC_MODEL_DESC_INIT;
  desc.layers = static_cast<int32_t>(config.layers);
  desc.topk = static_cast<int32_t>(config.topk);
  desc.index_head_dim = static_cast<int32_t>(config.index_dim);
  return desc;
}

// What the user asked for; without a wish, what the model's own config.json says.
Plan make_plan(const Options& options, const Config& config) {
  const idxc_model_desc model = describe(config);
  if (options.pattern) return check(Plan::from_pattern(model, options.pattern->c_str()));
  if (options.freq) return check(Plan::from_freq(model, IDXC_DIALECT_HF, *options.freq));
  return check(Plan::from_hf_config(options.config ? read_file(*options.config) : config.text));
}

// A plan may be fine and still be another model's.
void check_plan(const Plan& plan, const Config& config) {
  const idxc_plan_info info = check(plan.info());
  const auto refuse = [](const std::string& what) { throw UsageError("the pattern does not fit the model: " + what); };
  if (info.decoder_layers != config.layers) {
    refuse(std::to_string(info.decoder_layers) + " layers, the model has " + std::to_string(config.layers));
  }
  if (info.topk != config.topk)
    refuse("top-k " + std::to_string(info.topk) + ", the model's is " + std::to_string(config.topk));
  if (info.full_layers + info.shared_layers != config.layers || info.mtp_layers != 0) {
    refuse("this server has no dense and no draft layers");
  }
}

Plan plan_of(const Options& options, const Config& config) {
  const bool asked = options.pattern || options.freq || options.config;
  try {
    Plan plan = make_plan(options, config);
    check_plan(plan, config);
    return plan;
  } catch (const LibraryError& error) {
    // The library says what to change; whether on the command line or in the model's folder, only we know.
    if (asked) throw UsageError(error.what());
    throw std::runtime_error(options.model + "/config.json: " + error.what());
  }
}

Workload make_workload(const Options& options, const Config& config, const std::string& text) {
  const int64_t context = options.context.value_or(config.max_positions);
  if (context > config.max_positions) {
    throw UsageError("--context " + std::to_string(context) + " is more than the model's " +
                     std::to_string(config.max_positions));
  }
  if (context > static_cast<int64_t>(text.size()) / options.requests) {
    throw UsageError(options.text + " has " + std::to_string(text.size()) + " bytes, too few for " +
                     std::to_string(options.requests) + " requests of " + std::to_string(context));
  }
  Workload workload;
  workload.decode = options.decode;
  workload.chunk = options.chunk;
  for (int64_t i = 0; i < options.requests; ++i) {
    workload.prompts.push_back(
        std::string_view(text).substr(static_cast<size_t>(i * context), static_cast<size_t>(context)));
  }
  return workload;
}

// A short load, the same for both runs, so that neither pays for first touches of memory and sleeping threads.
Workload warm_up(const Workload& workload) {
  Workload small = workload;
  small.prompts.assign(1, workload.prompts[0].substr(0, 512));
  small.decode = std::min<int64_t>(workload.decode, 8);
  return small;
}

void add(Times& sum, const Times& times, double weight) {
  sum.total += weight * times.total;
  sum.indexer += weight * times.indexer;
  sum.attention += weight * times.attention;
}

void record(Run& run, const Outcome& outcome, int64_t repeats) {
  add(run.prefill, outcome.prefill, 1.0 / static_cast<double>(repeats));
  add(run.decode, outcome.decode, 1.0 / static_cast<double>(repeats));
  if (run.passes++ > 0) return;  // All else is the same in every pass.
  run.steps = outcome.steps;
  run.mixed_steps = outcome.mixed_steps;
  run.tokens = outcome.tokens;
  run.decode_only_tokens = outcome.decode_only_tokens;
  run.bits_per_byte = outcome.bits_per_byte();
  run.bits = outcome.bits;
  run.generated = outcome.generated;
}

// Both runs take turns, and turn about who goes first: a machine that slows down as it warms favours neither.
void measure(Arm& full, Arm& shared, Threads& threads, const Workload& workload, int64_t repeats, Progress& progress) {
  const auto advance = [&](int64_t rows) { progress.advance(rows); };
  progress.phase("warming up");
  for (Arm* arm : {&full, &shared}) serve_all(arm->engine, threads, warm_up(workload), advance);
  for (int64_t pass = 0; pass < repeats; ++pass) {
    Arm* first = pass % 2 == 0 ? &full : &shared;
    Arm* second = pass % 2 == 0 ? &shared : &full;
    for (Arm* arm : {first, second}) {
      progress.phase(arm->run.name + ", pass " + std::to_string(pass + 1) + " of " + std::to_string(repeats));
      record(arm->run, serve_all(arm->engine, threads, workload, advance), repeats);
    }
  }
}

Context make_context(int64_t threads) {
  idxc_context_desc desc = IDXC_CONTEXT_DESC_INIT;
  desc.backend = IDXC_BACKEND_CPU;
  desc.threads = static_cast<int32_t>(threads);
  return check(Context::create(desc));
}

Report serve(const Options& options) {
  const Model model = load_model(options.model);
  const Config& config = model.config;
  const Plan plan = plan_of(options, config);
  const Plan all_full =
      check(Plan::from_pattern(describe(config), std::string(static_cast<size_t>(config.layers), 'F').c_str()));
  const std::string text = read_file(options.text);
  const Workload workload = make_workload(options, config, text);
  const EngineSize size = workload_size(workload);

  const int64_t count = options.threads > 0 ? options.threads : std::max(1u, std::thread::hardware_concurrency());
  Threads threads(static_cast<int>(count));
  const Context context = make_context(count);
  Arm full("all-Full", model, context, all_full, threads, size);
  Arm shared("IndexCache", model, context, plan, threads, size);

  Report report;
  const int64_t rows = workload_rows(workload), warm_rows = workload_rows(warm_up(workload));
  {
    Progress progress(2 * warm_rows + 2 * options.repeats * rows + rows - options.requests * (options.decode - 1));
    measure(full, shared, threads, workload, options.repeats, progress);
    progress.phase("comparing selections");
    report.coverage = audit(full.engine, plan, context, threads, workload, [&](int64_t n) { progress.advance(n); });
  }
  report.model = options.model;
  report.isa = check(context.info()).isa;
  report.layers = config.layers;
  report.topk = config.topk;
  report.requests = options.requests;
  report.context = static_cast<int64_t>(workload.prompts[0].size());
  report.decode = options.decode;
  report.chunk = options.chunk;
  report.threads = count;
  report.repeats = options.repeats;
  report.runs = {full.run, shared.run};
  return report;
}

// The library never prints. What it thinks of a config, such as a field it overruled, belongs on stderr.
void log_warning(int32_t level, const char* message, void*) {
  if (level == IDXC_LOG_WARNING) std::fprintf(stderr, "indexcache: %s\n", message);
}

}  // namespace

int serve_main(const std::vector<std::string>& arguments, const std::string& default_model) {
  try {
    const Options options = parse_options(arguments, default_model);
    if (options.help) {
      std::fputs(usage, stdout);
      return 0;
    }
    check(indexcache::set_log_callback(log_warning, nullptr));
    const Report report = serve(options);
    std::fputs((options.json ? as_json(report) : as_table(report)).c_str(), stdout);
    return 0;
  } catch (const UsageError& error) {
    std::fprintf(stderr, "serve: %s\nserve --help lists the options\n", error.what());
    return 2;
  } catch (const std::bad_alloc&) {
    std::fputs("serve: out of memory\n", stderr);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "serve: %s\n", error.what());
  }
  return 1;
}

}  // namespace serve
