// A site opened from disk may not start a Worker. There its script runs in a hidden frame instead, for the search.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.worker = this;
      const open = "<script", close = "</" + "script>";
      frame.srcdoc =
        open + ">" +
        "const here = frameElement.worker;" +
        "window.postMessage = data => here.answer(data);" +
        "window.importScripts = (...urls) => { for (const url of urls) document.write(`" + open + " src=\"${url}\"><\\/script>`); };" +
        close + open + ' src="' + new URL(url, location) + '">' + close;
      this.frame = frame;
      this.ready = new Promise(done => frame.addEventListener("load", done, { once: true }));
      document.body.append(frame);
    }
    answer(data) {
      this.dispatchEvent(new MessageEvent("message", { data }));
    }
    async postMessage(data) {
      await this.ready;
      const inside = this.frame.contentWindow;
      inside.dispatchEvent(new inside.MessageEvent("message", { data }));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
