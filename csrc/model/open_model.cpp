#include "model/open_model.h"

namespace puna {

OpenedModel open_model(const std::string& path, const std::string& projector) {
  OpenedModel model;
  if (!is_gguf(path)) model.spec = read_model_spec(path);
  model.checkpoint = std::make_unique<Checkpoint>(path, projector);
  if (model.checkpoint->gguf()) model.spec = gguf_model_spec(*model.checkpoint);
  if (is_packed(*model.checkpoint))
    model.packed = std::make_unique<AdoptingLoader>(*model.checkpoint);
  model.weights = model.packed ? model.packed->weights(model.spec)
                               : resolve_weights(model.spec, *model.checkpoint);
  return model;
}

}  // namespace puna
