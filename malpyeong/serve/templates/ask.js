"use strict";
const at = (id) => document.getElementById(id);

// Texts are only ever set as text.
const list = (id, items, title, text) => {
  at(id).replaceChildren(...items.map((item) => {
    const details = document.createElement("details");
    const summary = document.createElement("summary");
    const body = document.createElement("p");
    summary.textContent = item[title];
    body.textContent = item[text];
    body.className = "text";
    details.append(summary, body);
    return details;
  }));
  if (!items.length) at(id).textContent = "없음";
};

const show = (whole, used) => {
  at("sentence").textContent = used.sentences.join(" / ") || whole;
  at("reason").textContent = used.reason;
  at("whole").textContent = (used.named_rule ? `[${used.named_rule}] ` : "") + whole;
  list("rules", used.rules, "id", "text");
  list("examples", used.examples, "question", "answer");
  at("answer").hidden = false;
};

at("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const headers = { "content-type": "application/json" };
  if (at("key")) headers.authorization = `Bearer ${at("key").value}`;
  const messages = [{ role: "user", content: at("question").value }];
  at("ask").disabled = true;
  at("answer").hidden = true;
  at("status").textContent = "답하는 중…";
  try {
    const body = JSON.stringify({ model: at("form").dataset.model, messages });
    const response = await fetch("v1/chat/completions", { method: "POST", headers, body });
    const reply = await response.json();
    if (!response.ok) throw new Error(`${response.status}: ${reply.error.message}`);
    show(reply.choices[0].message.content, reply.malpyeong);
    at("status").textContent = "";
  } catch (error) {
    at("status").textContent = `답을 받지 못했습니다(${error.message})`;
  } finally {
    at("ask").disabled = false;
  }
});
