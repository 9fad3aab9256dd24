// Train with a step that TrainStep.export wrote: without Python. README.md says how to build and run it.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "safetensors.h"

namespace fs = std::filesystem;
using safetensors::Tensors;

const char* const USAGE =
    "usage: train STEP.pt2 [--steps 1000] [--steps-per-call 32] [--lr X] [--seed 1] [--from STATE.safetensors]\n"
    "                      [--save TRAINED.safetensors] [--rows ROWS.safetensors]\n"
    "STEP.safetensors, STEP.training.safetensors and STEP.data.safetensors lie beside the program. --from goes on\n"
    "from what --save wrote. --rows has in \"rows\" the numbers of the rows of each minibatch: (minibatches, batch)\n"
    "int64. Without --lr, the rate is that of the export, or of --from.\n";

struct Options {
  fs::path program, from, save, rows;
  std::optional<int64_t> steps;
  int64_t steps_per_call = 32, seed = 1;
  std::optional<double> lr;
};

[[noreturn]] void fail(const std::string& problem) { throw std::runtime_error(problem); }

int64_t whole(const std::string& flag, const std::string& text, int64_t least) {
  char* end = nullptr;
  errno = 0;
  const int64_t value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != 0 || errno != 0 || value < least) {
    fail(flag + ": expected a whole number from " + std::to_string(least) + " on, got '" + text + "'");
  }
  return value;
}

double rate(const std::string& flag, const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != 0 || !(value >= 0 && value < 1e37)) {
    fail(flag + ": expected a number from 0 on, got '" + text + "'");
  }
  return value;
}

Options parse(const std::vector<std::string>& words) {
  Options options;
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string& flag = words[i];
    if (flag.rfind("--", 0) != 0 && options.program.empty()) {
      options.program = flag;
      continue;
    }
    const std::string value = i + 1 < words.size() ? words[++i] : "";
    if (flag == "--steps") options.steps = whole(flag, value, 0);
    else if (flag == "--steps-per-call") options.steps_per_call = whole(flag, value, 1);
    else if (flag == "--seed") options.seed = whole(flag, value, 0);
    else if (flag == "--lr") options.lr = rate(flag, value);
    else if (flag == "--from") options.from = value;
    else if (flag == "--save") options.save = value;
    else if (flag == "--rows") options.rows = value;
    else fail("there is no option " + flag + "\n" + USAGE);
  }
  if (options.program.extension() != ".pt2") fail(std::string("give the path of a program, STEP.pt2\n") + USAGE);
  if (!options.save.empty() && options.save.extension() != ".safetensors") fail("--save must end in .safetensors");
  if (options.from.empty()) options.from = fs::path(options.program).replace_extension(".safetensors");
  return options;
}

// STEP.training.safetensors beside STEP.pt2 or STEP.safetensors, for example.
fs::path beside(fs::path path, const char* kind) { return path.replace_extension(kind); }

std::string text_of(at::IntArrayRef shape) {
  std::string text;
  for (const int64_t n : shape) text += (text.empty() ? "" : ", ") + std::to_string(n);
  return "(" + text + ")";
}

// What a program says of itself: JSON in the metadata of its package.
struct Described {
  std::vector<std::string> inputs;  // names, in order
  Json same;                        // names in the model's state_dict -> the input that is the same tensor
  Json shapes;                      // of the tensors that training changes, and of one minibatch
  int64_t accumulate;               // minibatches a step

  explicit Described(torch::inductor::AOTIModelPackageLoader& loader) {
    const auto metadata = loader.get_metadata();
    const auto read = [&](const char* key) {
      if (!metadata.count(key)) fail(std::string("the program is none of TrainStep.export: no \"") + key + "\" in it");
      return safetensors::at_place(std::string("the program's \"") + key + "\"",
                                   [&] { return Json::parse(metadata.at(key)); });
    };
    inputs = read("inputs").texts();
    same = read("same");
    shapes = read("shapes");
    accumulate = read("accumulate").as_number();
    if (metadata.count("AOTI_DEVICE_KEY") && metadata.at("AOTI_DEVICE_KEY") != "cpu") {
      fail("the program is for " + metadata.at("AOTI_DEVICE_KEY") + "; export it from a model on the CPU");
    }
  }
};

// An input that is made of rows of the data in each call.
struct Drawn {
  size_t place;                // among the inputs
  at::Tensor data;             // (rows, ...)
  std::vector<int64_t> shape;  // of a minibatch
};

// The inputs in the order of the program: tensors that it changes in place, and what each call makes anew.
struct Inputs {
  std::vector<at::Tensor> all;
  std::vector<Drawn> drawn;
  std::optional<size_t> seeds;
  size_t last = 0;
  int64_t examples, batch;  // rows of the data, and of a minibatch

  Inputs(const Described& program, const Tensors& model, const Tensors& training, const Tensors& data)
      : all(program.inputs.size()) {
    for (size_t i = 0; i < all.size(); ++i) {
      const std::string& name = program.inputs[i];
      if (name == "first") {
        all[i] = at::scalar_tensor(0, at::kLong);
      } else if (name == "last") {
        last = i;
      } else if (name == "seeds") {
        seeds = i;
      } else {
        const std::vector<int64_t> shape = program.shapes[name].numbers();
        if (model.count(name) || training.count(name)) {
          all[i] = model.count(name) ? model.at(name) : training.at(name);
          if (all[i].sizes() != at::IntArrayRef(shape)) {
            fail(name + " must be of shape " + text_of(shape) + ", got " + text_of(all[i].sizes()));
          }
        } else if (data.count(name) && data.at(name).dim() > 0) {
          drawn.push_back({i, data.at(name), shape});
        } else {
          fail("the program needs a tensor " + name + ", which is in none of the files beside it");
        }
      }
    }
    if (drawn.empty() || drawn[0].shape.empty()) fail("the program takes no minibatches");
    examples = drawn[0].data.size(0);
    batch = drawn[0].shape[0];
    for (const Drawn& part : drawn) check(part, program.inputs);
  }

  // Make the inputs of K minibatches: of these rows (K, batch), and with seeds of this generator.
  void draw(const at::Tensor& rows, const at::Generator& generator) {
    const int64_t K = rows.size(0);
    for (const Drawn& part : drawn) {
      std::vector<int64_t> shape = part.shape;
      shape.insert(shape.begin(), K);
      all[part.place] = part.data.index_select(0, rows.reshape(-1)).view(shape);
    }
    if (seeds) all[*seeds] = at::randint(int64_t{1} << 31, {K}, generator, at::kLong);
    all[last] = at::scalar_tensor(K, at::kLong);
  }

 private:
  void check(const Drawn& part, const std::vector<std::string>& names) const {
    const std::string& name = names[part.place];
    if (part.data.size(0) != examples || examples == 0) {
      fail("the data have " + std::to_string(part.data.size(0)) + " rows of " + name + ", and " +
           std::to_string(examples) + " of " + names[drawn[0].place]);
    }
    if (part.data.numel() / examples * batch != c10::multiply_integers(part.shape)) {
      fail("a minibatch of " + name + " must be of shape " + text_of(part.shape) + ", which " + std::to_string(batch) +
           " rows of data of shape " + text_of(part.data.sizes()) + " do not make");
    }
  }
};

// The numbers of the rows of each minibatch.
at::Tensor load_rows(const fs::path& path, const Inputs& inputs) {
  const Tensors file = safetensors::load(path);
  if (!file.count("rows")) fail(path.string() + " has no tensor \"rows\"");
  const at::Tensor rows = file.at("rows");
  if (rows.scalar_type() != at::kLong || rows.dim() != 2 || rows.size(1) != inputs.batch) {
    fail("rows must be (minibatches, " + std::to_string(inputs.batch) + ") int64, got " + text_of(rows.sizes()) + " " +
         at::toString(rows.scalar_type()));
  }
  if (rows.numel() > 0 && (rows.min().item<int64_t>() < 0 || rows.max().item<int64_t>() >= inputs.examples)) {
    fail("rows must be from 0 to " + std::to_string(inputs.examples - 1));
  }
  return rows;
}

double resident_megabytes() {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    if (word == "VmRSS:") {
      double kilobytes = 0;
      status >> kilobytes;
      return kilobytes / 1024;
    }
  }
  return 0;  // another system than Linux
}

// Run the program; where it refuses a tensor, it says which by number, and this by name.
std::vector<at::Tensor> run(torch::inductor::AOTIModelPackageLoader& loader, const std::vector<std::string>& names,
                            const std::vector<at::Tensor>& inputs) {
  try {
    return loader.run(inputs);
  } catch (const std::exception& error) {
    const std::string text = error.what(), before = "input_handles[";
    const size_t begin = text.find(before), end = text.find(']', begin);
    if (begin == text.npos || end == text.npos) throw;
    fail(names.at(std::stoul(text.substr(begin + before.size()))) + text.substr(end + 1));
  }
}

volatile std::sig_atomic_t stopped = 0;

// The first Ctrl-C asks the training to end, a second one ends the process.
void stop(int signal) {
  stopped = 1;
  std::signal(signal, SIG_DFL);
}

int train(const Options& options) {
  setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", 1);  // a wrong shape or dtype is an error before anything changes
  const c10::InferenceMode no_autograd;
  const fs::path data_path = beside(options.program, ".data.safetensors");
  if (!options.save.empty() && fs::weakly_canonical(options.save) == fs::weakly_canonical(data_path)) {
    fail("--save would replace the data, " + data_path.string());
  }
  if (!fs::is_regular_file(options.program)) fail("there is no program " + options.program.string());
  Tensors model = safetensors::load(options.from);
  Tensors training = safetensors::load(beside(options.from, ".training.safetensors"));
  const Tensors data = safetensors::load(data_path);
  torch::inductor::AOTIModelPackageLoader loader(options.program.string());
  const Described program(loader);
  if (options.lr) {
    for (auto& [name, tensor] : training) {
      if (name == "lr" || name.rfind("lr.group", 0) == 0) tensor.fill_(*options.lr);
    }
  }
  for (const auto& [name, original] : program.same.as_map()) {
    if (!model.count(original.as_text())) fail(options.from.string() + " has no tensor " + original.as_text());
    model[name] = model[original.as_text()];  // the very same tensor, so that all its names are saved as it will be
  }
  Inputs inputs(program, model, training, data);

  const int64_t A = program.accumulate;
  int64_t steps = options.steps.value_or(1000);
  at::Tensor given;
  if (!options.rows.empty()) {
    given = load_rows(options.rows, inputs);
    steps = options.steps.value_or(given.size(0) / A);
    if (given.size(0) < steps * A) {
      fail(std::to_string(steps) + " steps take " + std::to_string(steps * A) + " rows of numbers, got " +
           std::to_string(given.size(0)));
    }
  }

  const auto save = [&] {
    if (options.save.empty()) return;
    safetensors::save(options.save, model);
    safetensors::save(beside(options.save, ".training.safetensors"), training);
  };
  save();  // so that what cannot be written is known now
  std::signal(SIGINT, stop);

  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(options.seed);
  const int64_t tenth = std::max<int64_t>(1, steps / 10);
  using Clock = std::chrono::steady_clock;
  Clock::time_point begun;
  int64_t done = 0, timed_from = 0, shown = 0;
  double sum = 0;  // of the losses since a line was shown
  std::string problem;
  std::cout << std::fixed << "     step        loss  resident MB" << std::endl;
  while (done < steps && !stopped) {
    const int64_t count = std::min(options.steps_per_call, steps - done), K = count * A;
    inputs.draw(given.defined() ? given.slice(0, done * A, done * A + K)
                                : at::randint(inputs.examples, {K, inputs.batch}, generator, at::kLong),
                generator);
    const std::vector<at::Tensor> outputs = run(loader, program.inputs, inputs.all);  // losses, wrong, gradients

    const int64_t wrong = outputs.at(1).item<int64_t>();
    if (wrong >= 0) {
      problem = "step " + std::to_string(done + wrong / A + 1) +
                ": an index is out of range, such as a label; the state is that after step " + std::to_string(done);
      break;
    }
    sum += outputs[0].sum(at::kDouble).item<double>();
    done += count;
    if (done / tenth > shown / tenth || done == steps) {
      const double mean = sum / static_cast<double>(done - shown);
      std::cout << std::setw(9) << done << std::setw(12) << std::setprecision(6) << mean << std::setw(13)
                << std::setprecision(1) << resident_megabytes() << std::endl;
      shown = done;
      sum = 0;
    }
    if (timed_from == 0) {  // the first call warms up
      timed_from = done;
      begun = Clock::now();
    }
  }
  if (timed_from > 0 && done > timed_from) {
    const std::chrono::duration<double, std::micro> taken = Clock::now() - begun;
    std::cout << std::setprecision(1) << taken.count() / static_cast<double>(done - timed_from) << " us a step\n";
  }
  save();
  if (!options.save.empty()) std::cout << "saved after step " << done << ": " << options.save.string() << std::endl;
  if (!problem.empty()) fail(problem);
  return stopped ? 130 : 0;
}

int main(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "--help") {
    std::cout << USAGE;
    return 0;
  }
  try {
    return train(parse({argv + 1, argv + argc}));
  } catch (const c10::Error& error) {
    std::cerr << "train: error: " << error.what_without_backtrace() << std::endl;
  } catch (const std::exception& error) {
    std::cerr << "train: error: " << error.what() << std::endl;
  }
  return 1;
}
