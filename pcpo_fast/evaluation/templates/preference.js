(function () {
  var box = document.querySelector("[data-page]"), id = box.dataset.page, pairs = box.querySelectorAll(".pair");
  var done = box.querySelector(".done"), status = box.querySelector("output"), name = box.querySelector("input");
  var store = "pcpo-preference-" + id, state = { voter: "", votes: {} }, at = 0;
  try { state = JSON.parse(localStorage.getItem(store)) || state; } catch (error) { }
  function keep() { try { localStorage.setItem(store, JSON.stringify(state)); } catch (error) { } }
  function voted() { return Object.keys(state.votes).length; }
  function next() {
    for (var i = 0; i < pairs.length; i += 1) { if (!(i in state.votes)) { return i; } }
    return pairs.length;
  }
  function show(place) {
    at = Math.max(0, Math.min(place, pairs.length));
    pairs.forEach(function (pair, i) { pair.hidden = i !== at; });
    done.hidden = at !== pairs.length;
    status.textContent = voted() + " of " + pairs.length + " judged";
  }
  function vote(choice) {
    if (at === pairs.length) { return; }
    state.votes[at] = choice; keep();
    show(at + 1 < pairs.length && !((at + 1) in state.votes) ? at + 1 : next());
  }
  function save() {
    state.voter = name.value.trim(); keep();
    if (!state.voter) { name.focus(); status.textContent = "Please write your name or a nickname first"; return; }
    var data = JSON.stringify({ page: id, voter: state.voter, votes: state.votes }, null, 1);
    var link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([data], { type: "application/json" }));
    link.download = "votes-" + state.voter.replace(/[^A-Za-z0-9_-]+/g, "_") + ".json";
    document.body.appendChild(link); link.click(); link.remove();
    status.textContent = "Saved " + voted() + " votes to " + link.download;
  }
  name.value = state.voter;
  name.addEventListener("input", function () { state.voter = name.value.trim(); keep(); });
  box.querySelectorAll("[data-vote]").forEach(function (button) {
    button.addEventListener("click", function () { vote(button.dataset.vote); });
  });
  box.querySelector("[data-back]").addEventListener("click", function () { show(at - 1); });
  box.querySelector("[data-save]").addEventListener("click", save);
  document.addEventListener("keydown", function (event) {
    if (event.target === name || event.altKey || event.ctrlKey || event.metaKey) { return; }
    var choice = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie" }[event.key];
    if (choice) { vote(choice); event.preventDefault(); }
    if (event.key === "Backspace") { show(at - 1); event.preventDefault(); }
  });
  show(next());
}());
