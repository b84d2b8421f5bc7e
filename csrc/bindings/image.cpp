// Image preprocessing as Python sees it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/module.h"
#include "image/preprocess.h"
#include "image/tiling.h"
#include "puna/error.h"

namespace py = pybind11;

namespace puna::bindings {

namespace {

using namespace py::literals;  // NOLINT

py::tuple plan(int64_t height, int64_t width, int64_t tile, int64_t max_tiles) {
  const TilePlan plan = plan_tiles(height, width, tile, max_tiles);
  return py::make_tuple(plan.rows, plan.columns, plan.height, plan.width);
}

py::tuple prepare(const py::array_t<uint8_t, py::array::c_style>& rgb, int64_t tile,
                  int64_t max_tiles) {
  if (rgb.ndim() != 3 || rgb.shape(2) != 3) {
    fail(ErrorCode::kImage, "[image] the array has ", rgb.ndim(),
         " dimensions; it must be (height, width, 3)");
  }
  auto* image = new PreparedImage();
  const py::capsule owner(image, [](void* p) { delete static_cast<PreparedImage*>(p); });
  {
    const uint8_t* data = rgb.data();
    const int64_t height = rgb.shape(0), width = rgb.shape(1);
    const py::gil_scoped_release release;
    *image = prepare_image(data, height, width, tile, max_tiles);
  }
  const py::array_t<float> pixels({image->tiles, int64_t{3}, tile, tile}, image->pixels.data(),
                                  owner);
  return py::make_tuple(pixels, image->rows, image->columns);
}

std::vector<int32_t> layout(int64_t rows, int64_t columns, int64_t tokens_per_tile,
                            const std::map<std::string, int32_t>& ids) {
  const auto id = [&](const char* name) {
    const auto found = ids.find(name);
    if (found == ids.end())
      fail(ErrorCode::kInvalidRequest, "[image] the token ", name, " is missing");
    return found->second;
  };
  return image_token_layout(rows, columns, tokens_per_tile,
                            {id("image_start"), id("image_end"), id("tile_x_separator"),
                             id("tile_y_separator"), id("image"), id("patch")});
}

}  // namespace

void bind_image(py::module_& module) {
  module.def("plan_tiles", &plan, "height"_a, "width"_a, "tile"_a, "max_tiles"_a = kMaxTiles,
             "(rows, columns, new height, new width) of a picture's canvas. Raises ImageError.");
  module.def(
      "prepare_image", &prepare, "rgb"_a, "tile"_a, "max_tiles"_a = kMaxTiles,
      "uint8 [H, W, 3] -> (float32 [tiles, 3, tile, tile], rows, columns). Raises ImageError.");
  module.def("image_token_layout", &layout, "rows"_a, "columns"_a, "tokens_per_tile"_a, "ids"_a,
             "Ids that stand for a picture of rows x columns tiles.");
}

}  // namespace puna::bindings
