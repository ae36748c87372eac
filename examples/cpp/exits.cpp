// Runs a bundle with exits from C++: reads the manifest and a policy, chains the segments in ONNX
// Runtime and stops each row at the first exit that is sure.
//
//     exits BUNDLE POLICY ROWS.npy [threads [rounds]]
//
// prints a line per row: class, exit, score, milliseconds. It runs bundles of one chain with one
// input, one row at a time, such as examples/digits. `edgeexit check BUNDLE` verifies the files.
// Rows are float32 in NumPy's format, as examples/cpp/README.md makes them.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>
#include <onnxruntime_cxx_api.h>

using nlohmann::json;

json read_json(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error(path + " cannot be read");
  return json::parse(file);
}

// Values of one tensor for one row, and where ONNX Runtime finds them.
struct Buffer {
  std::vector<float> values;
  Ort::Value tensor{nullptr};
};

// The threshold of each exit, as a policy's rule gives it: one for all, one each, or by name.
std::vector<double> thresholds_of(const json& rule, const json& exits) {
  const json& given = rule.at("thresholds");
  std::vector<double> found;
  for (size_t at = 0; at < exits.size(); ++at) {
    json one = given;
    if (given.is_array()) one = at < given.size() ? given[at] : json("never");
    if (given.is_object()) one = given.value(exits[at].at("name").get<std::string>(), json("never"));
    found.push_back(one == "never" ? INFINITY : one == "always" ? -INFINITY : one.get<double>());
  }
  return found;
}

class Chain {
 public:
  Chain(const std::string& bundle, const std::string& policy, int threads)
      : env_(ORT_LOGGING_LEVEL_WARNING, "exits") {
    const json manifest = read_json(bundle + "/manifest.json");
    const json& chain = manifest.at("chains").at("main");
    if (manifest.at("chains").size() != 1 || manifest.at("inputs").size() != 1)
      throw std::runtime_error(bundle + " has several chains or inputs; this example runs one");
    const json rules = read_json(policy).at("rules");
    const json rule = rules.at("main");
    for (const char* name : {"first", "last", "schedule"})
      if (!rule.at(name).is_null())
        throw std::runtime_error(policy + ": " + name + " is not known to this example");
    if (rule.at("patience") != 0)
      throw std::runtime_error(policy + ": patience is not known to this example");
    thresholds_ = thresholds_of(rule, chain.at("exits"));
    score_ = rule.at("score");

    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(threads);
    options.AddConfigEntry("session.intra_op.allow_spinning", "0");
    input_ = manifest.at("inputs")[0].at("name");
    add(manifest.at("inputs")[0]);
    for (const json& name : chain.at("components")) {
      const json& component = manifest.at("components").at(name.get<std::string>());
      open(bundle, name, component, chain.at("exits"), options);
    }
  }

  size_t row_size() const { return buffers_.at(input_).values.size(); }
  const std::string& exit_name(size_t exit) const { return exits_[exit].name; }
  float score(size_t exit) { return buffers_.at(exits_[exit].score).values[0]; }

  // The class of the largest logit at an exit.
  size_t answer(size_t exit) {
    const std::vector<float>& logits = buffers_.at(exits_[exit].logits).values;
    return std::max_element(logits.begin(), logits.end()) - logits.begin();
  }

  // Runs a row. Returns the number of the exit that answered.
  size_t run(const float* row) {
    std::copy(row, row + row_size(), buffers_.at(input_).values.begin());
    for (size_t at = 0;; ++at) {
      sessions_[at].Run(Ort::RunOptions{nullptr}, bindings_[at]);
      if (at + 1 == sessions_.size() || score(at) >= thresholds_[at]) return at;
    }
  }

 private:
  struct Exit {
    std::string name, logits, score;
  };

  // Makes room for one row of a tensor of the manifest.
  void add(const json& about) {
    std::vector<int64_t> shape;
    size_t count = 1;
    for (const json& axis : about.at("axes")) {
      if (axis.is_string() && axis != "batch")
        throw std::runtime_error("axis " + axis.get<std::string>() + " has no fixed size");
      shape.push_back(axis.is_string() ? 1 : axis.get<int64_t>());
      count *= shape.back();
    }
    if (about.at("dtype") != "float32") throw std::runtime_error("a tensor is not float32");
    Buffer& buffer = buffers_[about.at("name")];
    buffer.values.resize(count);
    buffer.tensor = Ort::Value::CreateTensor<float>(memory_, buffer.values.data(), count,
                                                    shape.data(), shape.size());
  }

  // Opens a component and binds what it reads, its states, and what its exit says.
  void open(const std::string& bundle, const std::string& name, const json& component,
            const json& exits, const Ort::SessionOptions& options) {
    const json& variant = component.at("variants")[0];
    if (variant.contains("requires"))
      throw std::runtime_error(name + " needs more than ONNX Runtime's standard operators");
    auto behind = std::find_if(exits.begin(), exits.end(),
                               [&](const json& one) { return one.at("behind") == name; });
    if (behind == exits.end()) throw std::runtime_error(name + " has no exit behind it");
    exits_.push_back({behind->at("name"), behind->at("outputs").at("logits"),
                      behind->at("scores").at(score_)});
    const std::string path = bundle + "/" + variant.at("graph").get<std::string>();
    sessions_.emplace_back(env_, path.c_str(), options);
    bindings_.emplace_back(sessions_.back());
    for (const json& input : component.at("inputs"))
      bindings_.back().BindInput(input.at("name").get<std::string>().c_str(),
                                 buffers_.at(input.at("name")).tensor);
    for (const json& output : component.at("outputs")) {
      const std::string made = output.at("name");
      const bool of_exit = made.find('/') != std::string::npos;
      if (of_exit && made != exits_.back().logits && made != exits_.back().score) continue;
      add(output);
      bindings_.back().BindOutput(made.c_str(), buffers_.at(made).tensor);
    }
  }

  Ort::Env env_;
  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::string input_, score_;
  std::vector<double> thresholds_;
  std::vector<Exit> exits_;
  std::map<std::string, Buffer> buffers_;
  std::vector<Ort::Session> sessions_;
  std::vector<Ort::IoBinding> bindings_;
};

// float32 values of a file that numpy.save wrote.
std::vector<float> read_npy(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  if (bytes.size() < 10 || std::string(bytes.data() + 1, 5) != "NUMPY")
    throw std::runtime_error(path + " is not a file of numpy.save");
  const size_t length = uint8_t(bytes[8]) + 256 * uint8_t(bytes[9]);
  const std::string header(bytes.data() + 10, std::min(length, bytes.size() - 10));
  if (header.find("'<f4'") == std::string::npos || header.find("True") != std::string::npos)
    throw std::runtime_error(path + " does not hold float32 rows in C order");
  const char* start = bytes.data() + 10 + length;
  const size_t count = (bytes.size() - 10 - length) / sizeof(float);
  std::vector<float> values(count);
  std::copy(start, start + count * sizeof(float), reinterpret_cast<char*>(values.data()));
  return values;
}

int main(int count, char** given) try {
  if (count < 4) throw std::runtime_error("usage: exits BUNDLE POLICY ROWS.npy [threads [rounds]]");
  const int threads = count > 4 ? std::atoi(given[4]) : 1;
  const int rounds = count > 5 ? std::atoi(given[5]) : 1;
  if (threads < 1 || rounds < 1) throw std::runtime_error("threads and rounds are 1 or more");
  const std::vector<float> rows = read_npy(given[3]);
  Chain chain(given[1], given[2], threads);
  if (rows.empty() || rows.size() % chain.row_size())
    throw std::runtime_error(std::string(given[3]) + " has no whole rows of this bundle's input");
  for (int round = 0; round < rounds; ++round)
    for (size_t at = 0; at < rows.size(); at += chain.row_size()) {
      const auto start = std::chrono::steady_clock::now();
      const size_t exit = chain.run(rows.data() + at);
      const std::chrono::duration<double, std::milli> took =
          std::chrono::steady_clock::now() - start;
      std::printf("%zu %s %.6f %.4f\n", chain.answer(exit), chain.exit_name(exit).c_str(),
                  chain.score(exit), took.count());
    }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 1;
}
