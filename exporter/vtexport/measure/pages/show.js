"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const slider = document.getElementById("stage");
  const views = [...document.querySelectorAll(".view")];
  const rows = [...document.querySelectorAll("#fate tbody tr")];
  const patch = document.getElementById("patch");
  let chosen = null;
  // Counts, as vtexport writes them everywhere.
  const figure = (count) => count.toLocaleString("en-US");
  const shade = document.getElementById("shade");
  const scored = document.querySelectorAll("#fate thead th").length === 4;

  // The patches that a stage rated, the more opaque the higher they rank.
  const heat = (moment) => {
    if (!shade) return;
    for (const svg of views) {
      const view = Number(svg.dataset.view);
      const { scores, ranks } = data.views[view];
      const shown = shade.checked && scores[moment];
      svg.classList.toggle("shaded", Boolean(shown));
      const layer = svg.querySelector(".heat");
      layer.replaceChildren();
      if (!shown) continue;
      ranks[moment].forEach((rank, place) => {
        if (rank === null) return;
        const rect = document.createElementNS(svg.namespaceURI, "rect");
        const set = { x: place % data.grid, y: Math.floor(place / data.grid), width: 1, height: 1 };
        for (const [name, value] of Object.entries(set)) rect.setAttribute(name, value);
        rect.setAttribute("fill-opacity", (0.85 * (1 - (rank - 1) / data.moments[moment].rated[view]) ** 2).toFixed(3));
        layer.append(rect);
      });
    }
  };

  const turnTo = (moment) => {
    for (const group of document.querySelectorAll(".moment")) {
      group.classList.toggle("on", Number(group.dataset.moment) === moment);
    }
    for (const row of document.querySelectorAll("#stages tbody tr")) {
      if (Number(row.dataset.moment) === moment) row.setAttribute("aria-current", "true");
      else row.removeAttribute("aria-current");
    }
    const { name, tokens, recycled } = data.moments[moment];
    const now = document.getElementById("now");
    const strong = document.createElement("strong");
    const value = document.createElement("data");
    strong.textContent = name[0].toUpperCase() + name.slice(1);
    value.value = String(tokens);
    value.textContent = figure(tokens);
    const merged = recycled ? `, ${figure(recycled)} merged` : "";
    now.replaceChildren(strong, " ", value, ` of ${figure(data.moments[0].tokens)} visual tokens${merged}`);
    slider.setAttribute("aria-valuetext", now.textContent);
    heat(moment);
    if (chosen) tell();
  };

  // What became of a patch in a stage, given its states before and behind it.
  const fate = (before, after) => {
    if (before === "-") return "not part of the image";
    if (before === "d") return "";
    if (after === "k") return "kept";
    if (after === "m") return before === "m" ? "in a merged token" : "merged";
    return before === "m" ? "dropped, as merged" : "dropped";
  };

  const digits = (score) => (score !== 0 && Math.abs(score) < 0.001 ? score.toExponential(2) : score.toPrecision(3));

  // What there is to say of the chosen patch: at the stage shown in one line, at all of them in the table.
  const tell = () => {
    const { view, row, column } = chosen;
    const { states, scores, ranks } = data.views[view];
    const place = row * data.grid + column;
    const title = `${views.length > 1 ? `View ${view + 1}, row` : "Row"} ${row + 1}, column ${column + 1}`;
    const facts = (moment) => {
      const became = fate(states[moment - 1][place], states[moment][place]);
      const score = scores[moment] ? scores[moment][place] : null;
      if (score === null) return [became, "", ""];
      return [became, digits(score), `${figure(ranks[moment][place])} of ${figure(data.moments[moment].rated[view])}`];
    };
    document.getElementById("where").textContent = title;
    rows.forEach((line, number) => {
      const cells = line.querySelectorAll("td");
      const [became, score, rank] = facts(number + 1);
      (scored ? [score, rank, became] : [became]).forEach((text, cell) => { cells[cell].textContent = text; });
    });
    const moment = Number(slider.value);
    const [became, score, rank] = moment ? facts(moment) : ["", "", ""];
    const said = moment ? `: ${became || "gone before"}${score && `, score ${score}, rank ${rank}`}` : "";
    patch.textContent = title + said;
  };

  const choose = (view, row, column) => {
    chosen = { view, row, column };
    for (const svg of views) {
      const cursor = svg.querySelector(".cursor");
      const here = Number(svg.dataset.view) === view;
      cursor.setAttribute("visibility", here ? "visible" : "hidden");
      if (here) {
        cursor.setAttribute("x", column);
        cursor.setAttribute("y", row);
      }
    }
    tell();
  };

  slider.addEventListener("input", () => turnTo(Number(slider.value)));
  if (shade) shade.addEventListener("change", () => heat(Number(slider.value)));
  // A reloaded page may come back with the slider where it was.
  turnTo(Number(slider.value));

  // Where nothing is pruned, there is nothing to choose.
  if (rows.length === 0) return;
  for (const hidden of [".control", ".readout", ".patch"]) document.querySelector(hidden).hidden = false;
  const last = data.grid - 1;
  const within = (number) => Math.min(Math.max(number, 0), last);
  for (const svg of views) {
    const view = Number(svg.dataset.view);
    let at = [0, 0];
    const move = (row, column) => {
      at = [within(row), within(column)];
      choose(view, ...at);
    };
    const point = (event) => {
      const box = svg.getBoundingClientRect();
      move(
        Math.floor(((event.clientY - box.top) / box.height) * data.grid),
        Math.floor(((event.clientX - box.left) / box.width) * data.grid),
      );
    };
    svg.setAttribute("role", "application");
    svg.setAttribute("tabindex", "0");
    svg.setAttribute("aria-label", `${svg.getAttribute("aria-label")}. Arrow keys go from patch to patch.`);
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("focus", () => {
      if (svg.matches(":focus-visible")) move(...at);
    });
    svg.addEventListener("keydown", (event) => {
      const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -last], End: [0, last] };
      const step = steps[event.key];
      if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      move(at[0] + step[0], at[1] + step[1]);
    });
  }
})();
