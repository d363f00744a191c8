// Classifies an image with an artifact folder for ONNX Runtime.
//
//     cmake -S . -B build && cmake --build build
//     build/run_onnxruntime FOLDER IMAGE.ppm
//
// Needs the headers and library of ONNX Runtime, and nlohmann/json for manifest.json. Tried with the headers of 1.21
// and the libraries of 1.21 and 1.32; 1.21 takes no 4-bit weights. The image is a binary PPM file (P6, 8 bits) of the
// size that the model takes: this program does not resize.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>
#include <onnxruntime_cxx_api.h>

using Json = nlohmann::json;

struct Image {
    int64_t height, width;
    std::vector<uint8_t> pixels;  // [H, W, 3]
};

Image read_ppm(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string kind;
    int64_t width = 0, height = 0, top = 0;
    file >> kind >> width >> height >> top;
    if (!file || kind != "P6" || top != 255) throw std::runtime_error(path + " is no binary PPM file of 8 bits");
    file.get();  // the one blank before the pixels
    Image image{height, width, std::vector<uint8_t>(static_cast<size_t>(3 * height * width))};
    if (!file.read(reinterpret_cast<char*>(image.pixels.data()), static_cast<std::streamsize>(image.pixels.size())))
        throw std::runtime_error(path + " ends before its last pixel");
    return image;
}

// [1, 3, H, W]: where `mean` is empty the pixels themselves, else normalised as in training, all of it in float32 and
// in this order: then it is what training saw, to the bit.
template <typename T>
std::vector<T> preprocess(const Image& image, const std::vector<float>& mean, const std::vector<float>& std) {
    const size_t size = static_cast<size_t>(image.height * image.width);
    std::vector<T> planes(3 * size);
    for (size_t at = 0; at < size; ++at)
        for (size_t channel = 0; channel < 3; ++channel) {
            const uint8_t pixel = image.pixels[3 * at + channel];
            planes[channel * size + at] =
                mean.empty() ? static_cast<T>(pixel)
                             : static_cast<T>((static_cast<float>(pixel) / 255.0f - mean[channel]) / std[channel]);
        }
    return planes;
}

template <typename T>
Ort::Value as_tensor(std::vector<T>& values, const std::vector<int64_t>& shape) {
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    return Ort::Value::CreateTensor<T>(memory, values.data(), values.size(), shape.data(), shape.size());
}

void classify(const std::string& folder, const std::string& path) {
    std::ifstream text(folder + "/manifest.json");
    const Json manifest = Json::parse(text);
    const Json& steps = manifest.at("preprocessing");
    const Json& entry = *manifest.at("inputs").begin();
    const Image image = read_ppm(path);
    const Json& wanted = entry.at("shape");
    if (wanted.at(1) != 3 || wanted.at(2) != image.height || wanted.at(3) != image.width)
        throw std::runtime_error("the model takes " + wanted.dump() + ", the image is of another size");

    const bool takes_pixels = entry.at("dtype") == "uint8";
    std::vector<float> mean, std;
    if (!takes_pixels) {
        if (steps.is_null() || steps.value("mean", Json()).is_null() || steps.value("std", Json()).is_null())
            throw std::runtime_error(folder + " does not say how an image becomes the model's input: no mean and std");
        mean = steps.at("mean").get<std::vector<float>>();
        std = steps.at("std").get<std::vector<float>>();
    }
    auto pixels = preprocess<uint8_t>(image, {}, {});
    auto real = preprocess<float>(image, mean, std);
    const std::vector<int64_t> shape{1, 3, image.height, image.width};
    Ort::Value input = takes_pixels ? as_tensor(pixels, shape) : as_tensor(real, shape);

    Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "edgeqat");
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(1);
    const std::string file = folder + "/" + manifest.at("model").get<std::string>();
    Ort::Session session(env, file.c_str(), options);
    Ort::AllocatorWithDefaultOptions allocator;
    const auto input_name = session.GetInputNameAllocated(0, allocator);
    const auto output_name = session.GetOutputNameAllocated(0, allocator);
    const char* inputs[] = {input_name.get()};
    const char* outputs[] = {output_name.get()};
    const auto found = session.Run(Ort::RunOptions{nullptr}, inputs, &input, 1, outputs, 1);

    const float* scores = found[0].GetTensorData<float>();
    std::vector<size_t> order(found[0].GetTensorTypeAndShapeInfo().GetElementCount());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return scores[a] > scores[b]; });
    const Json labels = steps.is_null() ? Json() : steps.value("labels", Json());
    for (size_t rank = 0; rank < std::min<size_t>(3, order.size()); ++rank) {
        const size_t best = order[rank];
        const std::string label = labels.is_null() ? std::to_string(best) : labels.at(best).get<std::string>();
        std::printf("%s\t%.6g\n", label.c_str(), static_cast<double>(scores[best]));
    }
}

int main(int argc, char** argv) {
    if (argc != 3) {
        std::cerr << "usage: run_onnxruntime FOLDER IMAGE.ppm\n";
        return 2;
    }
    try {
        classify(argv[1], argv[2]);
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << '\n';
        return 1;
    }
    return 0;
}
