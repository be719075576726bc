// The reveal viewer: draws the groups in #groups. Texts are set as text, never as HTML: a completion is untrusted.
"use strict";
(function () {
  const root = document.getElementById("viewer");
  if (!root) return;
  const groups = JSON.parse(document.getElementById("groups").textContent);
  const HUES = [275, 210, 160, 90, 35];
  const COLOURS = {
    reveal: ["reveal step", (c, i) => c.reveal[i]],
    logprob: ["log-prob (nats)", (c, i) => c.logprob[i]],
    entropy: ["entropy (nats)", (c, i) => c.entropy[i]],
    weight: ["importance weight", (c, i) => c.weight[i]],
    version: ["version", (c, i) => c.version[i]],
  };
  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const part = (name) => root.querySelector("[data-part=" + name + "]");
  const pick = part("group"), slider = part("step"), said = part("said"), play = part("play"), colour = part("colour");
  const list = part("completions"), about = part("about"), prompt = part("prompt"), low = part("low"), high = part("high");
  let group = null, cards = [], timer = null;

  const undrawn = (c, i) => c.version[i] < 0;
  const number = (value, digits) => (value === null || value === undefined ? "none" : Number(value.toPrecision(digits || 3)).toString());
  const shown = (text) => (text === "" ? "∅" : text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +$/, (s) => "␣".repeat(s.length)));

  function hue(value, least, most) {
    const at = (most > least ? (value - least) / (most - least) : 1) * (HUES.length - 1);
    const before = Math.min(Math.floor(at), HUES.length - 2);
    return HUES[before] + (HUES[before + 1] - HUES[before]) * (at - before);
  }

  function fact(name, value, kind) {
    const item = make("li");
    item.append(name + " ", make("b", kind, value));
    return item;
  }

  function card(c) {
    const box = make("article", "completion");
    box.append(make("h3", "", "Completion " + (c.index + 1)));
    const facts = make("ul", "facts");
    facts.append(fact("reward", number(c.reward)), fact("after cost", number(c.earned)), fact("NFE", String(c.nfe)));
    facts.append(fact("advantage", number(c.advantage), c.advantage > 0 ? "good" : c.advantage < 0 ? "bad" : ""));
    facts.append(fact("gamma", number(c.gamma)));
    for (const [name, value] of Object.entries(c.components)) facts.append(fact(name, number(value)));
    box.append(facts);
    const buttons = [], cells = group.side * group.side;
    const flow = make("div", "tokens");
    const grid = group.side ? make("div", "grid" + (group.side > 4 ? " nine" : "")) : null;
    if (grid) {
      grid.style.gridTemplateColumns = "repeat(" + group.side + ", max-content)";
      box.append(grid);
    }
    for (const [name, element] of [["Sudoku", grid], ["Tokens", flow]]) {
      if (!element) continue;
      element.setAttribute("role", "group");
      element.setAttribute("aria-label", name + " of completion " + (c.index + 1));
    }
    const told = make("p", "told", "Choose a token: arrow keys, or the pointer.");
    told.setAttribute("aria-live", "polite");
    c.tokens.forEach((text, i) => {
      const token = make("button", "tok");
      token.type = "button";
      token.tabIndex = i === 0 ? 0 : -1;
      if (grid && i < cells) {
        const block = Math.sqrt(group.side), column = i % group.side, line = Math.floor(i / group.side);
        token.classList.toggle("box-right", (column + 1) % block === 0 && column + 1 < group.side);
        token.classList.toggle("box-bottom", (line + 1) % block === 0 && line + 1 < group.side);
        token.classList.toggle("given", group.prompt[i] !== "0");
        grid.append(token);
      } else {
        flow.append(token);
        if (text.includes("\n")) flow.append(make("span", "break"));
      }
      const tell = () => {
        told.replaceChildren(...description(c, i));
        buttons.forEach((one) => one.setAttribute("aria-pressed", one === token ? "true" : "false"));
      };
      token.addEventListener("mouseenter", tell);
      token.addEventListener("focus", tell);
      token.addEventListener("click", tell);
      token.addEventListener("keydown", (event) => {
        const row = grid && i < cells ? group.side : 1;
        const to = { ArrowRight: i + 1, ArrowLeft: i - 1, ArrowDown: i + row, ArrowUp: i - row, Home: 0, End: buttons.length - 1 }[event.key];
        if (to === undefined || !buttons[to]) return;
        event.preventDefault();
        buttons.forEach((one) => (one.tabIndex = -1));
        buttons[to].tabIndex = 0;
        buttons[to].focus();
      });
      buttons.push(token);
    });
    if (flow.childElementCount) box.append(flow);
    box.append(told);
    return { c, box, buttons };
  }

  function description(c, i) {
    const parts = [make("b", "", "“" + shown(c.tokens[i]) + "”"), " position " + (i + 1)];
    if (undrawn(c, i)) parts.push(": filled in after the end, not drawn");
    else {
      parts.push(", revealed in step " + c.reveal[i] + " of " + c.nfe);
      parts.push(" · log-prob " + number(c.logprob[i]) + " (" + number(100 * Math.exp(c.logprob[i])) + " %)");
      parts.push(" · entropy " + number(c.entropy[i]) + " · version " + c.version[i]);
      parts.push(" · importance weight " + (c.weight[i] === null ? "none (not scored)" : number(c.weight[i])));
    }
    return parts;
  }

  function range() {
    const [, value] = COLOURS[colour.value];
    const found = group.completions.flatMap((c) => c.tokens.map((_, i) => (undrawn(c, i) ? null : value(c, i))));
    const known = found.filter((one) => one !== null);
    const extreme = (of) => known.reduce((one, other) => of(one, other)); // spread, they may be too many arguments
    return known.length ? [extreme(Math.min), extreme(Math.max)] : [0, 0];
  }

  function draw() {
    const step = Number(slider.value), [least, most] = range(), [, value] = COLOURS[colour.value];
    said.textContent = step + " of " + slider.max;
    slider.setAttribute("aria-valuetext", "denoising step " + step + " of " + slider.max);
    low.textContent = number(least);
    high.textContent = number(most);
    for (const { c, buttons } of cards) {
      buttons.forEach((token, i) => {
        const masked = c.reveal[i] > step && !(undrawn(c, i) && step >= c.nfe), there = value(c, i);
        token.classList.toggle("masked", masked);
        token.classList.toggle("undrawn", !masked && undrawn(c, i));
        token.classList.toggle("now", !masked && !undrawn(c, i) && c.reveal[i] === step && step < Number(slider.max));
        token.classList.toggle("long", !masked && c.tokens[i].length > 1);
        token.textContent = masked ? "·" : shown(c.tokens[i]);
        token.setAttribute("aria-label", masked ? "masked, position " + (i + 1) : shown(c.tokens[i]) + ", position " + (i + 1));
        token.title = masked ? "" : description(c, i).map((one) => one.textContent ?? one).join("");
        token.style.setProperty("--hue", there === null ? 0 : hue(there, least, most));
        token.style.setProperty("--sat", there === null ? "0%" : "65%");
      });
    }
  }

  function choose(at) {
    stop();
    group = groups[at];
    slider.max = Math.max(...group.completions.map((c) => c.nfe));
    slider.value = slider.max;
    const took = group.seconds === null ? "" : " · " + number(group.seconds) + " s from lease to hand-in";
    about.textContent = "Group " + group.group + " · learner step " + group.step + " · version " + group.version +
      " · staleness " + group.staleness + took + " · " + group.worker;
    prompt.textContent = group.prompt;
    cards = group.completions.map(card);
    list.replaceChildren(...cards.map((one) => one.box));
    draw();
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "▶ Play";
  }

  play.addEventListener("click", () => {
    if (timer !== null) return stop();
    if (Number(slider.value) >= Number(slider.max)) slider.value = 0;
    play.textContent = "❚❚ Pause";
    draw();
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      draw();
      if (Number(slider.value) >= Number(slider.max)) stop();
    }, Math.max(80, Math.min(600, 8000 / Number(slider.max))));
  });
  slider.addEventListener("input", () => { stop(); draw(); });
  colour.addEventListener("change", draw);
  groups.forEach((one, at) => pick.append(new Option("group " + one.group + " · step " + one.step + (one.why ? " · " + one.why : ""), at)));
  pick.addEventListener("change", () => choose(Number(pick.value)));
  for (const link of document.querySelectorAll("[data-at]")) {
    link.addEventListener("click", () => {
      pick.value = link.dataset.at;
      choose(Number(pick.value));
    });
  }
  choose(0);
})();
