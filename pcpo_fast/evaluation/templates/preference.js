(function () {
  var box = document.querySelector("[data-page]"), id = box.dataset.page, pairs = box.querySelectorAll(".pair");
  var done = box.querySelector(".done"), status = box.querySelector("output"), name = box.querySelector("input");
  var zoom = box.querySelector("dialog"), question = box.querySelector(".question");
  var asked = [["text", "Which image follows the text better?"], ["looks", "Which image looks better?"]];
  var store = "pcpo-preference-" + id, state = { voter: "", votes: {} }, at = 0, end = pairs.length * asked.length;
  try { state = JSON.parse(localStorage.getItem(store)) || state; } catch (error) { }
  // Places 0, 1, 2, ... are the first question on the first pair, the second on it, the first on the second pair, ...
  function pairOf(place) { return Math.floor(place / asked.length); }
  function answers(pair) {
    if (typeof state.votes[pair] !== "object") { state.votes[pair] = {}; }  // none, or of a page with one question
    return state.votes[pair];
  }
  function answered(place) { return asked[place % asked.length][0] in answers(pairOf(place)); }
  function keep() { try { localStorage.setItem(store, JSON.stringify(state)); } catch (error) { } }
  function count() {
    for (var place = 0, found = 0; place < end; place += 1) { found += answered(place); }
    return found;
  }
  function next(from) {
    for (var place = from; place < end; place += 1) { if (!answered(place)) { return place; } }
    return from > 0 ? next(0) : end;
  }
  function show(place) {
    at = Math.max(0, Math.min(place, end));
    pairs.forEach(function (pair, i) { pair.hidden = i !== pairOf(at); });
    done.hidden = at !== end;
    question.textContent = at === end ? "" : asked[at % asked.length][1];
    status.textContent = count() + " of " + end + " answers";
  }
  function vote(choice) {
    if (at === end) { return; }
    if (zoom.open) { zoom.close(); }
    answers(pairOf(at))[asked[at % asked.length][0]] = choice; keep();
    show(next(at + 1 < end ? at + 1 : 0));
  }
  function enlarge(side) {
    var image = at < end && pairs[pairOf(at)].querySelector("[data-vote='" + side + "'] img");
    if (!image) { return; }
    zoom.dataset.side = side;
    zoom.firstElementChild.src = image.src;
    zoom.firstElementChild.alt = image.alt;
    zoom.firstElementChild.className = image.className;
    if (!zoom.open) { zoom.showModal(); }
  }
  function save() {
    state.voter = name.value.trim(); keep();
    if (!state.voter) { name.focus(); status.textContent = "Please write your name or a nickname first"; return; }
    var votes = {};
    pairs.forEach(function (_, i) { if (Object.keys(answers(i)).length) { votes[i] = answers(i); } });
    var data = JSON.stringify({ page: id, voter: state.voter, votes: votes }, null, 1);
    var link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([data], { type: "application/json" }));
    link.download = "votes-" + state.voter.replace(/[^A-Za-z0-9_-]+/g, "_") + ".json";
    document.body.appendChild(link); link.click(); link.remove();
    status.textContent = "Saved " + count() + " answers to " + link.download;
  }
  name.value = state.voter;
  name.addEventListener("input", function () { state.voter = name.value.trim(); keep(); });
  box.querySelectorAll("[data-vote]").forEach(function (button) {
    button.addEventListener("click", function () { vote(button.dataset.vote); });
  });
  box.querySelectorAll("[data-zoom]").forEach(function (button) {
    button.addEventListener("click", function () { enlarge(button.dataset.zoom); });
  });
  zoom.addEventListener("click", function () { zoom.close(); });
  box.querySelector("[data-back]").addEventListener("click", function () { show(at - 1); });
  box.querySelector("[data-save]").addEventListener("click", save);
  document.addEventListener("keydown", function (event) {
    if (event.target === name || event.altKey || event.ctrlKey || event.metaKey) { return; }
    var choice = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie" }[event.key];
    if (choice) { vote(choice); event.preventDefault(); }
    if (event.key === "Backspace") { show(at - 1); event.preventDefault(); }
    if (event.key === "z") {
      if (!zoom.open) { enlarge("left"); } else if (zoom.dataset.side === "left") { enlarge("right"); } else { zoom.close(); }
    }
  });
  show(next(0));
}());
