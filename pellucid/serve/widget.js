// The explorer in a notebook: the page in a frame, whose requests go to the kernel as messages of the widget.
// The page posts {pellucid: "ask", id, path, method, body}, "stop" or "place"; the kernel answers with bytes.

let frames = 0;

function render({ model, el }) {
  const own = ++frames; // the same widget may be shown twice
  const frame = document.createElement("iframe");
  frame.title = "Pellucid's explorer";
  frame.style.cssText = `width:100%;height:${model.get("height")}px;border:1px solid #8884;border-radius:8px`;
  const fromPage = (event) => {
    const said = event.data;
    if (event.source !== frame.contentWindow || !said?.pellucid) return;
    if (said.pellucid === "place") {
      model.set("place", said.hash);
      model.save_changes();
    } else model.send({ ...said, frame: own });
  };
  const fromKernel = (said, buffers) => {
    if (said?.frame !== own) return;
    const [data] = buffers ?? [];
    const body = data ? new Uint8Array(data.buffer ?? data, data.byteOffset ?? 0, data.byteLength).slice() : null;
    frame.contentWindow?.postMessage({ ...said, pellucid: "answer", body }, "*");
  };
  addEventListener("message", fromPage);
  model.on("msg:custom", fromKernel);
  frame.srcdoc = model.get("page");
  el.append(frame);
  return () => {
    removeEventListener("message", fromPage);
    model.off("msg:custom", fromKernel);
  };
}

export default { render };
