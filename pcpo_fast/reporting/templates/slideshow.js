document.querySelectorAll("[data-frames]").forEach(function (box) {
  var frames = box.querySelectorAll("[data-label]"), range = box.querySelector("input"), text = box.querySelector("output");
  var button = box.querySelector("button"), timer = null;
  function show() {
    frames.forEach(function (frame, i) { frame.hidden = i !== +range.value; });
    text.textContent = frames[+range.value].dataset.label;
  }
  function stop() { clearInterval(timer); timer = null; button.textContent = "Play"; }
  range.max = frames.length - 1;
  range.value = frames.length - 1;
  range.addEventListener("input", function () { stop(); show(); });
  button.addEventListener("click", function () {
    if (timer) { stop(); return; }
    if (+range.value === frames.length - 1) { range.value = 0; show(); }
    button.textContent = "Stop";
    timer = setInterval(function () {
      range.value = +range.value + 1; show();
      if (+range.value === frames.length - 1) { stop(); }
    }, 700);
  });
  box.classList.add("live");
  show();
});
